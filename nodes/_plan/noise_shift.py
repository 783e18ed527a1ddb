"""Noise shifts as profiles: which curve a picture size gets, what a calibration becomes and what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...kernels.conditioning import ConditioningMap, compose
from ...kernels.noise_shift import Shift, ShiftPreset
from ...kernels.space import NoiseSpace
from ...models.calibration import (
    NOISE_SHIFT,
    Calibration,
    CondLevels,
    ModelIdentity,
    Size,
    conditioning_map,
    fitted,
    size_text,
)

SHIFT_METHOD = "noise shift"
MOST_SIZES = 24
LARGEST_SIDE = 16384  # pixels


def shift_for(profile: Calibration, size: Size, strength: float = 1.0) -> tuple[ConditioningMap, str]:
    """The map for pictures of `size` and a sentence on where it comes from.

    A calibrated size gets its own curve. Another one gets the curves of the next smaller and the next larger number of
    pixels in shares that are linear in the logarithm of the number; of sizes with equally many pixels the one of the
    nearest aspect ratio counts. The native size counts as calibrated to the identity unless the profile says otherwise.
    """
    curves: dict[Size, CondLevels | None] = {profile.resolution: None}
    curves |= {one.resolution: one for one in profile.alignments}
    below = _nearest([one for one in curves if math.prod(one) <= math.prod(size)], size)
    above = _nearest([one for one in curves if math.prod(one) >= math.prod(size)], size)
    if size in curves:
        below = above = size
    if below is None or above is None or below == above or math.prod(below) == math.prod(above):
        one = below or above
        assert one is not None  # the native size is always among them
        said = (
            f"{size_text(size)} is calibrated"
            if one == size
            else f"{size_text(size)} is not calibrated, so it gets the curve of {size_text(one)}"
        )
        return _map(profile, curves[one], strength), said + _size_of_change(profile, curves[one], strength) + "."
    share = math.log(math.prod(size) / math.prod(below)) / math.log(math.prod(above) / math.prod(below))
    parts = [_map(profile, curves[below], (1 - share) * strength), _map(profile, curves[above], share * strength)]
    said = (
        f"{size_text(size)} is not calibrated, so it gets {1 - share:.0%} of the curve of {size_text(below)} and "
        f"{share:.0%} of that of {size_text(above)}, by the logarithm of their pixels."
    )
    return compose(parts), said


def _nearest(sizes: Sequence[Size], size: Size) -> Size | None:
    """The one with the number of pixels, then the aspect ratio, nearest to those of `size`."""

    def distance(one: Size) -> tuple[float, float]:
        pixels, aspect = math.prod(one) / math.prod(size), one[0] * size[1] / (one[1] * size[0])
        return round(abs(math.log(pixels)), 9), abs(math.log(aspect))

    return min(sizes, key=distance, default=None)


def _map(profile: Calibration, curve: CondLevels | None, strength: float) -> ConditioningMap:
    if curve is None:  # any knot will do for the identity
        curve = CondLevels("", profile.resolution, (0.5,), (0.5,))
    return conditioning_map(profile, curve, strength)


def _size_of_change(profile: Calibration, curve: CondLevels | None, strength: float) -> str:
    if curve is None or curve.sigma == curve.sigma_cond or strength == 0:
        return ", nothing is changed"
    ratios = [
        odds(profile.space, b) / odds(profile.space, a) for a, b in zip(curve.sigma, curve.sigma_cond, strict=True)
    ]
    low, high = (ratio**strength for ratio in (min(ratios), max(ratios)))
    return f", the network is told {times_the_true(low, high)} {noise_word(profile.space)}"


def odds(space: str, sigma: float) -> float:
    """sigma / alpha."""
    return sigma if space == "ve" else sigma / (1 - sigma)


def times_the_true(low: float, high: float) -> str:
    """A range of factors in words; a noise level follows them."""
    if f"{low:.3g}" != f"{high:.3g}":
        return f"{low:.3g} to {high:.3g} times the true"
    return "the true" if f"{low:.3g}" == "1" else f"{low:.3g} times the true"


def noise_word(space: str) -> str:
    return "sigma" if space == "ve" else "sigma / (1 - sigma)"


def parse_sizes(text: str, multiple: int) -> list[Size]:
    """The sizes of a text such as "512x512, 768x512"; ValueError for what is no list of multiples of `multiple`."""
    sizes: list[Size] = []
    for word in text.replace("×", "x").replace(";", ",").replace("\n", ",").split(","):
        if not word.strip():
            continue
        sides = [side.strip() for side in word.lower().split("x")]
        if len(sides) == 1:
            sides *= 2
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"'sizes' lists picture sizes such as 512x512, 768x512, but it has '{word.strip()[:40]}'.")
        size = (int(sides[0]), int(sides[1]))
        if not all(0 < side <= LARGEST_SIDE and side % multiple == 0 for side in size):
            raise ValueError(
                f"The sides of 'sizes' must be multiples of {multiple} up to {LARGEST_SIDE}, but there is "
                f"{word.strip()[:40]}."
            )
        if size not in sizes:
            sizes.append(size)
    if len(sizes) > MOST_SIZES:
        raise ValueError(f"'sizes' may list at most {MOST_SIZES} sizes, but it has {len(sizes)}. Make two profiles.")
    return sizes


def noise_shift_profile(
    model: ModelIdentity, native: Size, shifts: Mapping[Size, Shift], base: Calibration | None, **how: Any
) -> Calibration:
    """The curves by size, after those of `base`, with their evidence and how they were found."""
    curves = {one.resolution: one for one in base.alignments} if base else {}
    curves |= {size: CondLevels("", size, shift.sigma, shift.sigma_cond) for size, shift in shifts.items()}
    evidence = dict(base.metrics) if base else {}
    evidence |= {size_text(size): _facts(shift) for size, shift in shifts.items()}
    ordered = sorted(curves.values(), key=lambda one: (math.prod(one.resolution), one.resolution))
    return fitted(model, NOISE_SHIFT, "noise shift", SHIFT_METHOD, native, evidence, alignments=ordered, **how)


def continues(profile: Calibration, model: ModelIdentity, native: Size, **how: Any) -> bool:
    """Whether `profile` holds finished sizes of this very fit: same model, weights, native size and settings."""
    made = noise_shift_profile(model, native, {}, None)
    same = ("kind", "config_hash", "weights_hash", "patches", "prediction", "resolution", "method")
    return all(getattr(profile, key) == getattr(made, key) for key in same) and all(
        profile.provenance.get(key) == value for key, value in how.items()
    )


def shift_report(size: Size, shift: Shift, space: NoiseSpace) -> str:
    """What was measured at one size and what it means, in lines."""
    per_level = ", ".join(
        f"{s:.3g} {d:+.3f} ({best - 1:+.1%})"
        for s, d, best in zip(shift.sigma, shift.offsets(space), shift.best, strict=True)
    )
    found = shift.verdict
    said = f"loss {found.mean:+.2%} on held-out pictures, t {found.t:.1f} (needed "
    if found.accepted:
        said += f"{found.needed:.1f}): kept"
    else:
        said = f"nothing to gain: {said}-1 % and {found.needed:.1f}); the network is told the true levels"
    return f"{size_text(size)}: {said}.\n  sigma, offset in log units (least loss of any candidate): {per_level}"


def shift_plan(sizes: Sequence[Size], preset: ShiftPreset, pictures: int) -> str:
    """What the fit costs, before it starts."""
    used = min(pictures, preset.pictures)
    each = replace(preset, pictures=used).evaluations
    said = (
        f"{used} pictures, {preset.levels} noise levels, {preset.offsets} candidates, {preset.noises} noises: {each} "
        "evaluations a size"
    )
    fewer = f" (the preset would use {preset.pictures} pictures)" if used < preset.pictures else ""
    return f"{said}{fewer}, {len(sizes)} {'size' if len(sizes) == 1 else 'sizes'}, without guidance."


def _facts(shift: Shift) -> dict[str, float | bool | None]:
    found = shift.verdict
    known = {"gain": -found.mean, "t": found.t, "needed": found.needed, "penalty": shift.penalty}
    rounded = {key: None if math.isnan(value) else round(value, 6) for key, value in known.items()}
    return {**rounded, "accepted": found.accepted}
