"""A fitted sampler around its mathematics: which short run serves, what is kept, what the user is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...models.calibration import SAMPLER, Calibration, ModelIdentity, Planned, ShortRun, fitted
from .propagation import FIDELITY

AUTO, FULL_RUN, LEARN_AGAIN, FORGET = "auto", "full run", "learn again", "forget"
NOT_FAST = "off"
USES = (AUTO, FULL_RUN, LEARN_AGAIN, FORGET)
COUNTS = (6, 8, 10, 12, 16)  # of evaluations, where the fewest that are faithful enough are looked for
METHOD = "fitted sampler"


@dataclass(frozen=True)
class Wish:
    """What the user asks of Attune Fast Sampler. use: one of USES or a profile's file name. evaluations: of the short
    run, 0: the fewest of COUNTS that reach `fidelity`. fidelity: dB that a short run must have proved. check_every: how
    many pictures until one is made in full again, 0: none."""

    use: str = AUTO
    evaluations: int = 10
    fidelity: float = 40.0
    check_every: int = 0


def serving_run(profile: Calibration, wish: Wish) -> ShortRun | None:
    """The shortest run that proved the fidelity, of as many steps as are asked for; None where there is none."""
    enough = [one for one in profile.runs if one.psnr >= wish.fidelity and wish.evaluations in (0, one.run.steps)]
    return min(enough, key=lambda one: one.run.steps, default=None)


def was_tried(profile: Calibration, wish: Wish) -> bool:
    """Whether what is asked for was fitted before, so that another run of the same kind would teach nothing."""
    counts = {wish.evaluations} if wish.evaluations else {n for n in COUNTS if n < profile.steps}
    return counts <= {one.run.steps for one in profile.runs}


def fitted_sampler(
    identity: ModelIdentity, planned: Planned, runs: Sequence[ShortRun], known: Calibration | None = None
) -> Calibration:
    """The calibration of a long run, with the runs of `known` for other counts of steps beside the new ones."""
    assert planned.size is not None
    anew = {one.run.steps for one in runs}
    kept = [one for one in (known.runs if known else ()) if one.run.steps not in anew]
    every = sorted([*kept, *runs], key=lambda one: one.run.steps)
    name = f"{planned.solver} {planned.steps} steps, {METHOD}"
    evidence = known.metrics.get("held_out", {}) if known else {}
    held_out = {count: said for count, said in evidence.items() if int(count) not in anew}
    metrics: dict[str, Any] = {"psnr": {str(one.run.steps): one.psnr for one in every}}
    return fitted(
        identity, SAMPLER, name, METHOD, planned.size, {**metrics, **({"held_out": held_out} if held_out else {})},
        solver=planned.solver, cfg=planned.cfg, sigmas=planned.levels, runs=every, setting=planned.setting,
    )  # fmt: skip


def best_run(profile: Calibration, steps: int = 0) -> ShortRun:
    """The run of so many steps; 0: the shortest that is faithful, else the most faithful. ValueError without one."""
    by_steps = {one.run.steps: one for one in profile.runs}
    if steps:
        if steps not in by_steps:
            raise ValueError(
                f"'{profile.name}' was fitted for {', '.join(map(str, by_steps))} steps, not for {steps}. Set 'steps' "
                "to one of these, to 0 for the shortest faithful one, or fit it again."
            )
        return by_steps[steps]
    faithful = [one for one in profile.runs if one.psnr >= FIDELITY]
    return faithful[0] if faithful else max(profile.runs, key=lambda one: one.psnr)


def steps_at(profile: Calibration, speed: float) -> int:
    """Of which run `best_run` takes: of those that ask so many times less than the long run's steps the one with the
    most steps, or else the fewest."""
    counts = [one.run.steps for one in profile.runs]
    return max((n for n in counts if n * speed <= profile.steps), default=min(counts))


def proved(short: ShortRun) -> str:
    """What is known of a short run's fidelity."""
    if not short.pictures:
        seen = "the half of its picture that it was not fitted to"
    else:
        seen = f"{short.pictures} other picture{'s' if short.pictures > 1 else ''}"
    return f"{short.run.steps} evaluations, {short.psnr:.1f} dB to the long run on {seen}"


def said_of_run(profile: Calibration, short: ShortRun, steps: int, name: str) -> str:
    """One sentence on a picture that a short run made."""
    date = profile.provenance.get("date", "")
    return f"The short run in place of {steps} steps: {proved(short)}, {date} ('{name}')."
