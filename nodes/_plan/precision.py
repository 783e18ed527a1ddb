"""What a precision guard found and did, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

KEPT = "Your file already keeps the sensitive parts in full: there is nothing to put in place."


@dataclass(frozen=True)
class PartFound:
    """One part of a network: how many of its weights are kept in which type, and how many a full one can replace.

    error: of the rounded weights, in parts of their size; None where there is no full file to compare with.
    """

    part: str
    kept: Counter
    low: int
    error: float | None = None


@dataclass(frozen=True)
class BitsPutBack:
    """How many bits of how many weights were put back, of `megabytes` together, and the weights' relative rms error
    before and after."""

    bits: int
    count: int
    megabytes: float
    before: float
    after: float


def precision_report(
    parts: Sequence[PartFound],
    embedding: float | None,
    placed: int,
    megabytes: float,
    file: str,
    packed: Sequence[str],
    more: BitsPutBack | None = None,
    in_8_bits: int = 0,
) -> str:
    """A line for each sensitive part, then what was done and what is left to the user.

    placed: weights in place, of `megabytes` together; packed: classes that are read only; in_8_bits: matrices that are
    multiplied in 8 bits, so that no bits could be put back to them.
    """
    lines = [_line(part) for part in parts]
    if embedding is not None:
        lines.append(f"The time embedding's answer is {embedding:.2%} off (rms over the model's timesteps).")
    low = sum(part.low for part in parts)
    if not low:
        lines.append(KEPT)
    elif placed:
        lines.append(f"{placed} full weights from '{file}' take their place, {megabytes:.1f} MB.")
        if placed < low:
            lines.append(f"That file itself rounds the other {low - placed}.")
    elif file:
        lines.append(f"'{file}' rounds them, too: choose one in half or full precision.")
    else:
        lines.append(
            "Nothing was changed. What rounding took away is known to the full file alone: choose the one that this "
            "model was made from in 'full_precision'."
        )
    if more and more.count:
        lines.append(
            f"{more.count} other weights get {more.bits} more bit{'s' * (more.bits > 1)} each, {more.megabytes:.1f} "
            f"MB: they were rounded by {more.before:.2%} and now are by {more.after:.2%}."
        )
    if in_8_bits:
        lines.append(
            f"{in_8_bits} matrices are multiplied in 8 bits, so more bits would not reach them: choose 'fp8_e4m3fn' "
            "in place of 'fp8_e4m3fn_fast' in Load Diffusion Model."
        )
    if packed:
        kinds = ", ".join(packed)
        lines.append(f"Weights of the kind {kinds} were not replaced, because their loader unpacks them itself.")
    return "\n".join(lines)


def _line(part: PartFound) -> str:
    types = ", ".join(f"{count} in {kept}" for kept, count in part.kept.most_common())
    error = "" if part.error is None else f"; rounded by {part.error:.2%}"
    return f"{part.part}: {types}{error}."
