"""Tune a schedule to one model, solver, guidance, size and number of steps, and prove the gain on other noises.

Every candidate runs through the very solver it is for and is measured by how far its pictures are from those of many
small steps with the same noise. Known schedules are screened. On the best of them the timesteps of a first-order solver
are aligned to the exact paths; told those, its levels are refined by a pattern search. What does not help pictures that
no stage has seen, by more than chance and by more than the reference may be wrong (`gate`), is dropped, so the answer
can be the best known schedule, unchanged. No gradients, one noise at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .conditioning import ConditioningMap
from .gate import Verdict, judge
from .schedules import check_sigmas
from .space import NoiseSpace
from .timestep_aligner import CALLS_PER_STEP, Alignment, ToldDenoiser, Trajectory, align, block_norm, block_norms
from .types import Latent, Sigmas

FIRST_MOVE, LAST_MOVE = 0.35, 0.04  # of the gap to the neighbouring level, in ln(sigma / alpha)
ENOUGH = 0.001  # relative gain at which the search takes a move
FINALISTS = 2  # known schedules that also run on the held-out noises before one of them is the start
EXACT_ENOUGH = 1 / 3  # of the best candidate's error; beyond, no fit could gain what the gate asks for


@dataclass(frozen=True)
class TunerPreset:
    """How much is spent: noises to fit on and to hold out, steps of the reference, schedules to screen, moves."""

    fit: int
    held_out: int
    reference_steps: int
    candidates: int
    trials: int

    def evaluations(self, steps: int, candidates: int, calls: int = 1, aligned: bool = False) -> int:
        """The most calls of the guided model that `tune` makes; `calls`: those of one step of the solver."""
        run, seeds = steps * calls, self.fit + self.held_out
        reference = self.reference_steps * seeds + self.reference_steps // 2
        search = (min(candidates, self.candidates) + self.trials) * run * self.fit
        gates = (FINALISTS + (2 if aligned else 1)) * run * self.held_out
        return reference + search + gates + ((CALLS_PER_STEP * steps + run) * self.fit if aligned else 0)


TUNER_PRESETS = {
    "mini": TunerPreset(1, 6, 40, 9, 10),
    "quick": TunerPreset(2, 9, 48, 14, 24),
    "standard": TunerPreset(4, 12, 48, 14, 40),
}


@dataclass(frozen=True)
class Runner:
    """The model and solver at hand.

    solve: the end of a run of the solver, told a map or None. record: the path of a run of the reference solver.
    denoise: x, sigma, sigma_cond -> denoised, for solvers whose step is Euler's; else None and nothing is aligned.
    calls: of the model in one step of the solver. highest: the highest level the network knows.
    """

    solve: Callable[[Sigmas, Latent, ConditioningMap | None], Latent]
    record: Callable[[Sigmas, Latent], Trajectory]
    denoise: ToldDenoiser | None = None
    calls: int = 1
    highest: float = math.inf


@dataclass(frozen=True)
class Progress:
    """What is being done, evaluations so far and predicted in all, the best schedule yet and its error (inf: none)."""

    stage: str
    evaluations: int
    predicted: int
    best: Sigmas | None = None
    error: float = math.inf


@dataclass(frozen=True)
class Tuned:
    """The schedule, its alignment or None, and the evidence.

    start: name of the best known schedule, of all noises. candidates: name -> error on the fitted noises. held_out:
    mean error on the others, of "start" and of "aligned" and "refined" where kept. reference_error: of the reference
    itself, estimated from half its steps. refused: one sentence for each stage that was left out. verdicts: what the
    gate found, of "aligned" and "refined" where it was asked, each against what was kept before it.
    """

    sigmas: Sigmas
    alignment: Alignment | None
    start: str
    candidates: dict[str, float]
    held_out: dict[str, float]
    reference_error: float
    evaluations: int
    refused: list[str] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """On held-out noises."""
        return min(self.held_out.values())

    @property
    def changed(self) -> bool:
        """Whether something better than the best known schedule was found."""
        return len(self.held_out) > 1 and self.error < self.held_out["start"]


def tune(
    runner: Runner, candidates: Mapping[str, Sigmas], reference: Sigmas, noises: Sequence[Latent], preset: TunerPreset,
    space: NoiseSpace, has_time: Callable[[], bool] = lambda: True, levels: bool = True, timesteps: bool = True,
) -> Generator[Progress, None, Tuned]:  # fmt: skip
    """Screen the first `preset.candidates` of the schedules, align, refine, keep what helps on held-out noises.

    All candidates have the same number of steps. `noises`: fit + held_out of them. `reference`: the levels of its run.
    levels, timesteps: whether these are fitted; timesteps only where the runner has `denoise`. Once `has_time` says no,
    what is left of the search is skipped and its best goes to the gate.
    """
    if len(noises) != preset.fit + preset.held_out:
        raise ValueError(f"The preset needs {preset.fit + preset.held_out} noises, but there are {len(noises)}.")
    work = _Work(runner, preset, dict(list(candidates.items())[: preset.candidates]), space)
    yield from work.teach(reference, noises)
    yield from work.screen()
    yield from work.choose_start()
    if work.can_search():
        if timesteps and runner.denoise is not None and has_time():
            yield from work.align(levels)
        if levels:
            yield from work.refine(has_time)
    return work.tuned()


def reference_levels(steps: int, space: NoiseSpace, sigma_min: float, sigma_max: float) -> Sigmas:
    """The levels of the reference run, float64 [steps+1]: where DPM-Solver++(2M) comes nearest to the exact paths.

    On VE those of Karras et al. 2022 (arXiv 2206.00364, equation 5), then 0. On flow the arcsine law, dense at both
    ends, as ComfyUI's `beta` has it without a shift.
    """
    if space.kind == "flow":
        return sigma_max * torch.sin(torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)) ** 2
    root = torch.linspace(sigma_max ** (1 / 7), sigma_min ** (1 / 7), steps, dtype=torch.float64)
    return torch.cat([root**7, torch.zeros(1, dtype=torch.float64)])


def check_candidates(candidates: Mapping[str, Sigmas]) -> None:
    """ValueError unless there are schedules, valid ones, of one number of steps, that end in 0."""
    if not candidates:
        raise ValueError("There is no schedule to start from: give at least one.")
    steps = {len(check_sigmas(sigmas)) - 1 for sigmas in candidates.values()}
    if len(steps) > 1:
        raise ValueError(f"Schedules are compared at one number of steps, but these have {sorted(steps)}.")
    open_ends = [name for name, sigmas in candidates.items() if sigmas[-1] != 0]
    if open_ends:
        raise ValueError(f"Schedules are compared at the end of the run, but '{open_ends[0]}' does not end in 0.")


def picture_errors(end: Latent, exact: Latent) -> Tensor:
    """The deviation of every picture of a noise's end from the exact one, [b]: the mean norm of its blocks, relative to
    that of the exact end."""
    return block_norms(end - exact).mean(1).double().cpu() / block_norm(exact)


def reference_error(end: Latent, coarse: Latent) -> float:
    """How far the reference's end is from the truth, in the unit of `picture_errors`, by a run of half as many steps.

    Errors of the second-order reference fall to a quarter: the difference is three times the error that is left. The
    median over blocks: single blocks that settle on another content are chance, which no fit can follow.
    """
    return float(block_norms(coarse - end).median()) / block_norm(end) / 3


def _mean(errors: Tensor) -> float:
    """inf where a run failed."""
    value = float(errors.mean())
    return value if math.isfinite(value) else math.inf


class _Work:
    """The counters and the best so far of one call of `tune`.

    best, error: of the search, on the fitted noises. kept, before: what has passed the gate, and its errors [pictures]
    on the held-out noises.
    """

    def __init__(self, runner: Runner, preset: TunerPreset, candidates: dict[str, Sigmas], space: NoiseSpace):
        check_candidates(candidates)
        self.runner, self.preset, self.candidates, self.space = runner, preset, candidates, space
        self.steps = len(next(iter(candidates.values()))) - 1
        self.evaluations, self.looks = 0, 1
        self.predicted = preset.evaluations(self.steps, len(candidates), runner.calls, runner.denoise is not None)
        self.noises: list[Latent] = []
        self.paths: list[Trajectory] = []
        self.ends: list[Latent] = []
        self.reference_error = math.inf
        self.errors: dict[str, float] = {}
        self.start = ""
        self.best = self.kept = next(iter(candidates.values()))
        self.error = math.inf
        self.before = torch.full((1,), math.inf)
        self.alignment: Alignment | None = None
        self.a_map: ConditioningMap | None = None
        self.held_out: dict[str, float] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.refused: list[str] = []

    def progress(self, stage: str) -> Progress:
        known = math.isfinite(self.error)
        return Progress(stage, self.evaluations, self.predicted, self.best if known else None, self.error)

    def tuned(self) -> Tuned:
        return Tuned(
            self.kept, self.alignment, self.start, self.errors, self.held_out, self.reference_error, self.evaluations,
            self.refused, self.verdicts,
        )  # fmt: skip

    def teach(self, reference: Sigmas, noises: Sequence[Latent]) -> Generator[Progress, None, None]:
        """The paths that count as exact, and how exact the first one is."""
        for i, noise in enumerate(noises):
            path = self.runner.record(reference, noise)
            self.evaluations += len(reference) - 1
            self.ends.append(path.end.clone())  # alone, without the states before it
            if i < self.preset.fit and self.runner.denoise is not None:
                self.paths.append(path)
            yield self.progress("reference")
        self.noises = list(noises)
        half = torch.cat([reference[:-1:2], reference[-1:]])
        self.reference_error = reference_error(self.ends[0], self.runner.record(half, noises[0]).end)
        self.evaluations += len(half) - 1
        yield self.progress("reference")

    def screen(self) -> Generator[Progress, None, None]:
        for name, sigmas in self.candidates.items():
            error = self.errors[name] = self.fitted_error(sigmas)
            if error < self.error or not self.start:
                self.best, self.error, self.start = sigmas, error, name
            yield self.progress("known schedules")

    def choose_start(self) -> Generator[Progress, None, None]:
        """Let the best of the known schedules run on the held-out noises, too: the one that is best on all noises is
        the start."""
        finalists = sorted(self.errors, key=lambda name: self.errors[name])[:FINALISTS]
        share, unseen, all_noises = self.preset.held_out / len(self.noises), {}, {}
        for name in finalists:
            unseen[name] = self.unseen_errors(self.candidates[name], None)
            all_noises[name] = (1 - share) * self.errors[name] + share * _mean(unseen[name])
            yield self.progress("held-out noises")
        self.start = min(finalists, key=lambda name: all_noises[name])
        self.best, self.error = self.candidates[self.start], self.errors[self.start]
        self.kept, self.before = self.best, unseen[self.start]
        self.held_out["start"] = _mean(self.before)

    def can_search(self) -> bool:
        """Whether the reference is exact enough for any fit to pass the gate."""
        error = self.held_out["start"]
        if self.reference_error <= EXACT_ENOUGH * error:
            return True
        self.refused.append(
            f"The levels were not searched: the reference itself is off by {self.reference_error:.3g}, which is not "
            f"small beside the error of {self.start}, {error:.3g}."
        )
        return False

    def align(self, more: bool) -> Generator[Progress, None, None]:
        """Align the timesteps of the start to the exact paths, and keep the map if the gate lets it pass.

        more: whether another look at the held-out noises follows.
        """
        fitted = yield from self._aligned()
        a_map = fitted.through(self.space)
        if a_map is None:
            self.refused.append("The aligned timesteps were not kept: no step gains from another than the true one.")
            return
        self.looks = 1 + more
        if self.passes("aligned", "aligned timesteps", self.kept, a_map):
            self.alignment, self.a_map = fitted, a_map
            self.error = self.fitted_error(self.best)
        yield self.progress("held-out noises")

    def _aligned(self) -> Generator[Progress, None, Alignment]:
        assert self.runner.denoise is not None
        before = self.evaluations
        fit = align(self.runner.denoise, self.kept, self.paths, self.space, self.runner.highest)
        while True:
            try:
                self.evaluations = before + next(fit)
            except StopIteration as end:
                return end.value
            yield self.progress("aligning")

    def refine(self, has_time: Callable[[], bool]) -> Generator[Progress, None, None]:
        """Search for better levels, and keep them if the gate lets them pass."""
        yield from self._search(has_time)
        if torch.equal(self.best, self.kept):
            self.refused.append("The levels stay as they are: no move of a level helped on the fitted noises.")
            return
        if self.passes("refined", "refined levels", self.best, self.a_map):
            self.kept = self.best
        yield self.progress("held-out noises")

    def _search(self, has_time: Callable[[], bool]) -> Generator[Progress, None, None]:
        """Pattern search: one level at a time by a share of the gap to its neighbour, a smaller share once none helps.

        The first level and the final 0 stay. The direction in which a level moved last is tried first.
        """
        trials, move, towards = 0, FIRST_MOVE, [1] * (self.steps + 1)
        while move >= LAST_MOVE:
            gained = False
            for i in range(1, self.steps):
                for direction in (towards[i], -towards[i]):
                    if trials == self.preset.trials or not has_time():
                        return
                    moved = moved_level(self.best, i, direction * move, self.space)
                    error, trials = self.fitted_error(moved), trials + 1
                    better = error < (1 - ENOUGH) * self.error
                    if better:
                        self.best, self.error, towards[i], gained = moved, error, direction, True
                    yield self.progress("refining")
                    if better:
                        break
            if not gained:
                move /= 2

    def passes(self, stage: str, what: str, sigmas: Sigmas, a_map: ConditioningMap | None) -> bool:
        """One look at the held-out noises: whether they gain by `sigmas`, told the map, over what was kept."""
        after = self.unseen_errors(sigmas, a_map)
        verdict = self.verdicts[stage] = judge(self.before, after, self.looks, self.reference_error)
        if verdict.accepted:
            self.before, self.held_out[stage] = after, verdict.after
        else:
            self.refused.append(f"The {what} were not kept: on held-out pictures {verdict.said}.")
        return verdict.accepted

    def fitted_error(self, sigmas: Sigmas) -> float:
        return _mean(self._errors(sigmas, range(self.preset.fit), self.a_map))

    def unseen_errors(self, sigmas: Sigmas, a_map: ConditioningMap | None) -> Tensor:
        """On the held-out noises, [pictures]."""
        return self._errors(sigmas, range(self.preset.fit, len(self.noises)), a_map)

    def _errors(self, sigmas: Sigmas, which: range, a_map: ConditioningMap | None) -> Tensor:
        errors = []
        for i in which:
            end = self.runner.solve(sigmas, self.noises[i], a_map)
            self.evaluations += self.steps * self.runner.calls
            errors.append(picture_errors(end, self.ends[i]))
        return torch.cat(errors)


def moved_level(sigmas: Sigmas, i: int, share: float, space: NoiseSpace) -> Sigmas:
    """`sigmas` with level i moved by `share` of the gap to its neighbour, up for a positive one, in ln(sigma / alpha).

    Towards an end at 0 or at a flow's 1, which have no logarithm, the gap on the other side counts; 1 without any.
    """
    log_ratio = space.log_ratio(sigmas.double())
    above, below = (abs(float(b - a)) for a, b in pairwise(log_ratio[i - 1 : i + 2]))
    gap, other = (above, below) if share > 0 else (below, above)
    gap = next((g for g in (gap, other) if math.isfinite(g)), 1.0)
    moved = sigmas.clone()
    moved[i] = space.at_log_ratio(log_ratio[i] + share * gap)
    return moved
