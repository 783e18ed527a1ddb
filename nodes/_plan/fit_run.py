"""A fit of the sampler itself around its mathematics: for how many steps, what is reported, what becomes a profile."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...kernels.fitted_sampler import Proof, polish_cost
from ...kernels.gate import CHANCE, FEWEST, sign_count
from ...kernels.tuner import TunerPreset
from ...models.calibration import Calibration, Planned, ShortRun, size_text
from .fit_sampler import Setting
from .fitted_sampler import METHOD, fitted_sampler
from .time_left import duration

YOUR_RUN, EXACT_PATH = "your run", "exact path"
MOST_COUNTS = 10


def counts_of(steps: int, more: str) -> list[int]:
    """The counts to fit for, ascending; ValueError for a text that lists none."""
    numbers = [part for part in re.split(r"[,;\s]+", more.strip()) if part]
    if not all(re.fullmatch(r"\d{1,3}", part) and 2 <= int(part) <= 100 for part in numbers):
        raise ValueError(
            f"'more_steps' must list numbers of steps from 2 to 100, such as '6, 8, 12', but it is '{more}'. Leave it "
            "empty to fit 'steps' alone."
        )
    counts = sorted({steps, *map(int, numbers)})
    if len(counts) > MOST_COUNTS:
        raise ValueError(f"'more_steps' lists {len(counts)} counts with 'steps', but at most {MOST_COUNTS} are fitted.")
    return counts


def evaluations(
    preset: TunerPreset, long: int, counts: Sequence[int], rivals: int, exact: bool = False, batch: int = 1
) -> int:
    """The most calls of the guided model: two to see how long one takes, the long runs, of the exact path a half one
    for its own error, then the known samplers, the fits, their polish and the proofs."""
    each = rivals * preset.fit + 2 * preset.fit + 2 * preset.held_out
    polishing = preset.fit * sum(map(polish_cost, counts)) if preset.fit * batch > 1 else 0
    return 2 + long * (preset.fit + preset.held_out) + (-(-long // 2) if exact else 0) + sum(counts) * each + polishing


def check_looks(counts: int, pictures: int, preset: str) -> None:
    """ValueError where so few pictures could not pass the gate for any of so many counts, whatever they show."""
    most = max((n for n in range(1, MOST_COUNTS + 1) if sign_count(CHANCE / n, pictures) <= pictures), default=0)
    if pictures >= FEWEST and counts > most:
        raise ValueError(
            f"{counts} numbers of steps are to be proved, but {pictures} held-out pictures can prove {most} at most. "
            f"List fewer in 'more_steps', take a larger 'preset' than '{preset}', or a 'latent' of several pictures."
        )


def proved_profile(
    proofs: Sequence[Proof], setting: Setting, long: Sequence[float], pictures: int, seconds: float, run_setting: str
) -> Calibration | None:
    """The runs that held-out pictures let pass; None without any. run_setting: see `Planned`."""
    runs = [ShortRun(one.run, round(max(one.psnr, 0.0), 2), pictures) for one in proofs if one.verdict.accepted]
    if not runs:
        return None
    planned = Planned(setting.runs, len(long) - 1, setting.cfg, setting.resolution, tuple(long), run_setting)
    made = fitted_sampler(setting.model, planned, runs)
    evidence = {str(one.run.steps): {"rival": one.rival, "verdict": one.verdict.said} for one in proofs}
    return made.with_facts({"held_out": evidence}, seconds=round(seconds, 1), seed=setting.seed)


def in_short(profile: Calibration | None, seconds: float) -> str:
    """A line for the node: what was kept, and how long it took."""
    if profile is None:
        return f"Nothing was proved to be better than the best known sampler, {duration(seconds)}."
    kept = "; ".join(f"{one.run.steps} evaluations, {one.psnr:.1f} dB" for one in profile.runs)
    return f"Kept: {kept}. {duration(seconds)}."


def run_report(
    proofs: Sequence[Proof], setting: Setting, long: int, what: str, plan: str, seconds: float, used: int,
    counts: Sequence[int],
) -> str:  # fmt: skip
    """What was measured for each count, kept and refused, in lines."""
    lines = [
        f"{METHOD.capitalize()} for {what}: {long} steps of {setting.runs}, cfg {setting.cfg:g}, "
        f"{size_text(setting.resolution)}.",
        plan,
        "Error: distance of the end of a run from that of the long run with the same noise, relative.",
    ]
    for one in proofs:
        kept = "kept" if one.verdict.accepted else "refused"
        lines.append(
            f"{one.run.steps} evaluations, {kept}: {one.psnr:.1f} dB. Beside the best known, {one.rival}: "
            f"{one.verdict.said}."
        )
    left = [str(n) for n in counts if n not in [one.run.steps for one in proofs]]
    if left:
        lines.append(f"No time was left for {', '.join(left)}: allow more 'budget_minutes'.")
    if setting.runs != setting.solver:
        lines.append(f"Fitted to {setting.runs}, which {setting.solver} follows but for the noise that it adds.")
    if not any(one.verdict.accepted for one in proofs):
        lines.append("Nothing was proved to be better than the best known sampler: there is no profile.")
    lines.append(f"{used} evaluations in {seconds:.0f} s.")
    return "\n".join(lines)
