"""A fit of the sampler itself, inside one run of the host's sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.fitted_sampler import Attempt, Proof, prove
from ...kernels.timestep_aligner import Trajectory
from ...kernels.tuner import TunerPreset, reference_error, reference_levels
from .._plan.fit_sampler import Setting
from .session import Solver, Solves, draw_noises
from .stock_schedules import known_schedules

# Beside the user's own sampler, each with the known schedules.
RIVALS = ("euler", "dpmpp_2m", "uni_pc", "lms", "er_sde without noise")
SCHEDULES = 4  # known ones, the most promising


@dataclass(frozen=True)
class Task:
    """What is fitted to what: the long run's levels, or None for the exact path; counts of steps; whether the levels of
    the short runs are searched."""

    sigmas: Tensor | None
    counts: Sequence[int]
    levels: bool


def rival_schedules(model, steps: int) -> dict[str, Tensor]:
    return dict(list(known_schedules(model, steps).items())[:SCHEDULES])


def rivals_of(solver: Solver) -> list[str]:
    """The samplers with one evaluation a step that a fit has to beat, the user's own among them."""
    return list(dict.fromkeys([*([solver.runs] if solver.calls == 1 else []), *RIVALS]))


def fit_run(
    model, solves: Solves, setting: Setting, solver: Solver, task: Task, preset: TunerPreset, empty: Tensor,
    minutes: float,
) -> Generator[Attempt, None, tuple[list[Proof], Trajectory, float]]:  # fmt: skip
    """The proofs for each count, the first held-out long run, and the seconds that one long run took."""
    began, about = time.monotonic(), setting.model
    noises = draw_noises(empty, setting.seed, preset.fit + preset.held_out)
    own = task.sigmas is not None
    long = task.sigmas if own else reference_levels(
        preset.reference_steps, setting.space, about.sigma_min, about.sigma_max
    )  # fmt: skip
    assert long is not None
    record: Callable = solves.record_own if own else solves.record
    paths, started = [], time.monotonic()
    for noise in noises:
        paths.append(record(long, noise))
        yield Attempt("long runs")
    each = (time.monotonic() - started) / len(noises)
    doubt = 0.0
    if not own:
        half = solves.record(torch.cat([long[:-1:2], long[-1:]]), noises[0])
        doubt = reference_error(paths[0].end, half.end)

    def end(name: str, sigmas: Tensor, i: int) -> Tensor:
        return solves.solve_by(name, sigmas, noises[i])

    def rivals(steps: int) -> dict[str, Callable[[int], Tensor]]:
        ways: dict[str, Callable[[int], Tensor]] = {}
        for name in rivals_of(solver):
            for schedule, sigmas in rival_schedules(model, steps).items():
                ways[f"{name} on {schedule}"] = partial(end, name, sigmas)
        return ways

    in_time = lambda: not minutes or time.monotonic() < began + 60 * minutes
    proofs = yield from prove(
        solves.denoise_over, paths, preset.held_out, task.counts, rivals, setting.space, task.levels, doubt, in_time
    )
    return proofs, paths[preset.fit], each
