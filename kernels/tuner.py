"""Tune a schedule to one model, solver, guidance, size and number of steps, and prove the gain on other noises.

Every candidate runs through the very solver it is for and is measured by how far its pictures are from those of many
small steps with the same noise. Known schedules are screened. On the best of them the timesteps of a first-order solver
are aligned to the exact paths; told those, its levels are refined by a pattern search. What does not help on noises
that no stage has seen, by more than chance, is dropped, so the answer can be the best known schedule, unchanged. No
gradients, one noise at a time.

In place of the search and the alignment the bound of Align Your Steps can be minimised, under the same gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .ays import CANDIDATES as LEVEL_CANDIDATES
from .ays import minimise_klub, ve_denoiser
from .conditioning import ConditioningMap
from .schedules import check_sigmas
from .space import NoiseSpace
from .timestep_aligner import CANDIDATES, Alignment, ToldDenoiser, Trajectory, align, block_norm, block_norms
from .types import Denoiser, Latent, Sigma, Sigmas

FIRST_MOVE, LAST_MOVE = 0.35, 0.04  # of the gap to the neighbouring level, in ln(sigma / alpha)
ENOUGH = 0.001  # relative gain at which the search takes a move
GATE = 0.01  # relative gain on held-out noises at which a stage is kept
SURE = 2.0  # and by how many standard errors of the paired differences it must gain
FEW_PICTURES = 4  # with fewer on held-out noises, their blocks are compared in place of the pictures
FINALISTS = 2  # known schedules that also run on the held-out noises before one of them is the start
BOUND_SWEEPS = 6  # over all levels, at most
BOUND_DRAWS = 8  # of two noise levels, for each fitted noise and estimate
BOUND_START = "normal"  # uniform in the timestep, where the authors start
LARGEST_RATIO = 1000.0  # sigma / alpha that stands for the bound's upper end on flow, whose 1 has none
EXACT_ENOUGH = 1 / 3  # of the best candidate's error: with a less exact reference a fit would follow its errors


@dataclass(frozen=True)
class Preset:
    """How much is spent: noises to fit on and to hold out, steps of the reference, schedules to screen, moves."""

    fit: int
    held_out: int
    reference_steps: int
    candidates: int
    trials: int

    def evaluations(self, steps: int, candidates: int, order: int = 1, aligned: bool = False) -> int:
        """The most calls of the guided model that `tune` makes; `order`: calls in one step of the solver."""
        run, seeds = steps * order, self.fit + self.held_out
        reference = self.reference_steps * seeds + self.reference_steps // 2
        search = (min(candidates, self.candidates) + self.trials) * run * self.fit
        gates = (FINALISTS + (2 if aligned else 1)) * run * self.held_out
        return reference + search + gates + ((CANDIDATES * steps + run) * self.fit if aligned else 0)

    def bound_evaluations(self, steps: int, candidates: int, order: int = 1) -> int:
        """The most calls of the guided model that `tune_by_bound` makes."""
        run, seeds = steps * order, self.fit + self.held_out
        reference = self.reference_steps * seeds + self.reference_steps // 2
        sweep = 4 * LEVEL_CANDIDATES * BOUND_DRAWS * self.fit * (steps - 1) + run * self.fit
        screened = min(candidates, self.candidates) * run * self.fit
        return reference + screened + BOUND_SWEEPS * sweep + run * self.fit + (FINALISTS + 1) * run * self.held_out


PRESETS = {
    "mini": Preset(1, 1, 32, 9, 10),
    "quick": Preset(2, 2, 48, 14, 24),
    "standard": Preset(4, 2, 48, 14, 40),
}


@dataclass(frozen=True)
class Runner:
    """The model and solver at hand.

    solve: the end of a run of the solver, told a map or None. record: the path of a run of the reference solver.
    denoise: x, sigma, sigma_hat -> denoised, for solvers whose step is Euler's; else None and nothing is aligned.
    order: evaluations of the model in one step of the solver. highest: the highest level the network knows.
    denoise_at: x [n b ...], sigma [n b] -> denoised, b pictures at a time; for the bound alone.
    """

    solve: Callable[[Sigmas, Latent, ConditioningMap | None], Latent]
    record: Callable[[Sigmas, Latent], Trajectory]
    denoise: ToldDenoiser | None = None
    order: int = 1
    highest: float = math.inf
    denoise_at: Denoiser | None = None


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
    error on the others, of "start" and of "aligned" and "refined" where kept. reference_error: of the reference itself,
    estimated from half its steps. refused: one sentence for each stage that was left out.
    """

    sigmas: Sigmas
    alignment: Alignment | None
    start: str
    candidates: dict[str, float]
    held_out: dict[str, float]
    reference_error: float
    evaluations: int
    refused: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """On held-out noises."""
        return min(self.held_out.values())

    @property
    def changed(self) -> bool:
        """Whether something better than the best known schedule was found."""
        return len(self.held_out) > 1 and self.error < self.held_out["start"]


def tune(
    runner: Runner,
    candidates: Mapping[str, Sigmas],
    reference: Sigmas,
    noises: Sequence[Latent],
    preset: Preset,
    space: NoiseSpace,
    has_time: Callable[[], bool] = lambda: True,
) -> Generator[Progress, None, Tuned]:
    """Screen the first `preset.candidates` of the schedules, align, refine, keep what helps on held-out noises.

    All candidates have the same number of steps. `noises`: fit + held_out of them. `reference`: the levels of its run.
    Once `has_time` says no, what is left of the search is skipped and its best goes to the gate.
    """
    if len(noises) != preset.fit + preset.held_out:
        raise ValueError(f"The preset needs {preset.fit + preset.held_out} noises, but there are {len(noises)}.")
    work = _Work(runner, preset, dict(list(candidates.items())[: preset.candidates]), space)
    yield from work.teach(reference, noises)
    yield from work.screen()
    before = yield from work.choose_start()
    refused: list[str] = []
    held_out = {"start": mean(before)}
    start, kept, alignment = work.start, work.best, None

    exact = work.reference_error <= EXACT_ENOUGH * held_out["start"]
    if not exact:
        refused.append(
            f"No search: the reference's own error {work.reference_error:.3g} is not small against the error of "
            f"{start}, {held_out['start']:.3g}."
        )
    if exact and runner.denoise is not None and has_time():
        fitted = yield from work.align(kept)
        a_map = fitted.through(space)
        after = before if a_map is None else work.held_out(kept, a_map)
        yield work.progress("held-out noises")
        if is_gain(before, after):
            alignment, before, held_out["aligned"] = fitted, after, mean(after)
            work.tell(a_map)
        elif a_map is None:
            refused.append("The aligned timesteps were not kept: no step gains from another than the true one.")
        else:
            refused.append(_refusal("aligned timesteps", before, after, "the true ones"))
    if exact:
        yield from work.refine(has_time)
        if not torch.equal(work.best, kept):
            after = work.held_out(work.best, work.a_map)
            yield work.progress("held-out noises")
            if is_gain(before, after):
                kept, held_out["refined"] = work.best, mean(after)
            else:
                refused.append(_refusal("refined levels", before, after, start))
    return Tuned(
        kept, alignment, start, work.errors, held_out, work.reference_error, work.evaluations, refused
    )  # fmt: skip


def tune_by_bound(
    runner: Runner,
    candidates: Mapping[str, Sigmas],
    reference: Sigmas,
    noises: Sequence[Latent],
    preset: Preset,
    space: NoiseSpace,
    sigma_min: float,
    generator: torch.Generator,
    has_time: Callable[[], bool] = lambda: True,
) -> Generator[Progress, None, Tuned]:
    """Screen the known schedules, then minimise the bound of Align Your Steps from the time-uniform one.

    The data of the bound are the reference's own ends on the fitted noises. The bound ranks schedules wrongly near its
    minimum, so the sweep with the least error on the fitted noises is taken and kept if it passes the gate of `tune`.
    """
    if len(noises) != preset.fit + preset.held_out:
        raise ValueError(f"The preset needs {preset.fit + preset.held_out} noises, but there are {len(noises)}.")
    work = _Work(runner, preset, dict(list(candidates.items())[: preset.candidates]), space, bound=True)
    yield from work.teach(reference, noises)
    yield from work.screen()
    before = yield from work.choose_start()
    start, kept = work.start, work.best
    held_out, refused = {"start": mean(before)}, []
    found = yield from work.minimise_bound(candidates.get(BOUND_START, kept), sigma_min, generator, has_time)
    if found is not None:
        after = work.held_out(found)
        yield work.progress("held-out noises")
        if is_gain(before, after):
            kept, held_out["refined"] = found, mean(after)
        else:
            refused.append(_refusal("levels of the bound", before, after, start))
    return Tuned(kept, None, start, work.errors, held_out, work.reference_error, work.evaluations, refused)


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


def is_gain(before: Tensor, after: Tensor) -> bool:
    """Whether errors [pictures blocks] of the same held-out pictures fell by 1 % in the mean, and surely.

    A mean alone is ruled by the worst picture, which a fit to few of them mends at the cost of the others.
    """
    return mean(after) <= (1 - GATE) * mean(before) and standard_errors(before, after) <= -SURE


def standard_errors(before: Tensor, after: Tensor) -> float:
    """The mean change from `before` to `after` [pictures blocks] in standard errors of the paired differences.

    Over pictures, over all blocks where there are few pictures; without any spread to see, infinite.
    """
    change = (after - before).double()
    change = change.mean(1) if len(change) >= FEW_PICTURES else change.flatten()
    spread = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
    fall = float(change.mean())
    return fall / spread if spread else math.copysign(math.inf, fall)


def mean(errors: Tensor) -> float:
    """inf where a run failed."""
    value = float(errors.mean())
    return value if math.isfinite(value) else math.inf


def _refusal(what: str, before: Tensor, after: Tensor, instead: str) -> str:
    errors = f"error {mean(after):.3g} against {mean(before):.3g}"
    sure = abs(standard_errors(before, after))
    chance = f", which is {sure:.1f} standard errors only" if mean(after) <= (1 - GATE) * mean(before) else ""
    return f"The {what} were not kept: on held-out noises {errors} with {instead}{chance}."


class _Work:
    """The counters and the best so far of one call of `tune`."""

    def __init__(
        self, runner: Runner, preset: Preset, candidates: dict[str, Sigmas], space: NoiseSpace, bound: bool = False
    ):
        check_candidates(candidates)
        self.runner, self.preset, self.candidates, self.space = runner, preset, candidates, space
        self.steps = len(next(iter(candidates.values()))) - 1
        self.evaluations = 0
        self.predicted = (
            preset.bound_evaluations(self.steps, len(candidates), runner.order)
            if bound
            else preset.evaluations(self.steps, len(candidates), runner.order, runner.denoise is not None)
        )
        self.noises: list[Latent] = []
        self.paths: list[Trajectory] = []
        self.ends: list[Latent] = []
        self.errors: dict[str, float] = {}
        self.best: Sigmas = next(iter(candidates.values()))
        self.a_map: ConditioningMap | None = None
        self.error = math.inf
        self.start = ""
        self.reference_error = math.inf

    def progress(self, stage: str) -> Progress:
        known = math.isfinite(self.error)
        return Progress(stage, self.evaluations, self.predicted, self.best if known else None, self.error)

    def teach(self, reference: Sigmas, noises: Sequence[Latent]) -> Generator[Progress, None, None]:
        """The paths that count as exact, and how exact the first one is, from a run of half as many steps.

        Errors of the second-order reference fall to a quarter: the difference is three times the error that is left.
        """
        for i, noise in enumerate(noises):
            path = self.runner.record(reference, noise)
            self.evaluations += len(reference) - 1
            self.ends.append(path.end)
            if i < self.preset.fit and self.runner.denoise is not None:
                self.paths.append(path)
            yield self.progress("reference")
        self.noises = list(noises)
        half = torch.cat([reference[:-1:2], reference[-1:]])
        coarse = self.runner.record(half, noises[0]).end
        self.evaluations += len(half) - 1
        self.reference_error = block_norm(coarse - self.ends[0]) / block_norm(self.ends[0]) / 3
        yield self.progress("reference")

    def screen(self) -> Generator[Progress, None, None]:
        for name, sigmas in self.candidates.items():
            error = self.errors[name] = self.fitted_error(sigmas)
            if error < self.error or not self.start:
                self.best, self.error, self.start = sigmas, error, name
            yield self.progress("known schedules")

    def choose_start(self) -> Generator[Progress, None, Tensor]:
        """Let the best of the known schedules run on the held-out noises, too; the one that is best on all noises is
        the start. Returns its held-out errors."""
        finalists = sorted(self.errors, key=lambda name: self.errors[name])[:FINALISTS]
        held_out, all_noises = {}, {}
        for name in finalists:
            held_out[name] = self.held_out(self.candidates[name])
            share = self.preset.held_out / len(self.noises)
            all_noises[name] = (1 - share) * self.errors[name] + share * mean(held_out[name])
            yield self.progress("held-out noises")
        self.start = min(finalists, key=lambda name: all_noises[name])
        self.best, self.error = self.candidates[self.start], self.errors[self.start]
        return held_out[self.start]

    def refine(self, has_time: Callable[[], bool]) -> Generator[Progress, None, None]:
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

    def minimise_bound(
        self, start: Sigmas, sigma_min: float, generator: torch.Generator, has_time: Callable[[], bool]
    ) -> Generator[Progress, None, Sigmas | None]:
        """The sweep with the least error, as a schedule that ends in 0; None when there was no time for any.

        The bound wants positive levels: `start` with `sigma_min`, or half its last level if that is less, in place of
        its 0. It runs as a 0 again.
        """
        denoise_at = self.runner.denoise_at
        assert denoise_at is not None
        data = torch.cat(self.ends[: self.preset.fit] * BOUND_DRAWS)  # [n b ...]
        levels = start.double().clone()
        levels[-1] = min(sigma_min, float(levels[-2]) / 2)
        ratio = (levels / self.space.alpha(levels)).clamp(max=LARGEST_RATIO)

        def counted(x: Latent, sigma: Sigma) -> Latent:
            self.evaluations += len(x) // len(self.noises[0])
            return denoise_at(x, sigma)

        def as_schedule(levels: Sigmas) -> Sigmas:
            sigmas = self.space.at_log_ratio(levels.log())
            return torch.cat([start[:1].double(), sigmas[1:-1], torch.zeros(1, dtype=torch.float64)]).to(start)

        held_out = lambda levels: self.fitted_error(as_schedule(levels))
        search = minimise_klub(ve_denoiser(counted, self.space), data, ratio, generator, held_out, BOUND_SWEEPS)
        found, least = None, math.inf
        while has_time():
            try:
                sweep = next(search)
            except StopIteration as end:
                return as_schedule(end.value)
            if sweep is not None and sweep.error < least:
                found, least = as_schedule(sweep.sigmas), sweep.error
                if least < self.error:
                    self.best, self.error = found, least
            yield self.progress("minimising the bound")
        return found

    def align(self, sigmas: Sigmas) -> Generator[Progress, None, Alignment]:
        assert self.runner.denoise is not None
        before = self.evaluations
        fit = align(self.runner.denoise, sigmas, self.paths, self.space, self.runner.highest)
        while True:
            try:
                self.evaluations = before + next(fit)
            except StopIteration as end:
                return end.value
            yield self.progress("aligning")

    def tell(self, a_map: ConditioningMap | None) -> None:
        """The map with which levels are tried from now on."""
        self.a_map = a_map
        self.error = self.fitted_error(self.best)

    def fitted_error(self, sigmas: Sigmas) -> float:
        return mean(self._errors(sigmas, range(self.preset.fit), self.a_map))

    def held_out(self, sigmas: Sigmas, a_map: ConditioningMap | None = None) -> Tensor:
        return self._errors(sigmas, range(self.preset.fit, len(self.noises)), a_map)

    def _errors(self, sigmas: Sigmas, which: range, a_map: ConditioningMap | None) -> Tensor:
        """The deviation from the exact ends, relative to their noise's mean norm, [pictures blocks]."""
        errors = []
        for i in which:
            end = self.runner.solve(sigmas, self.noises[i], a_map)
            self.evaluations += self.steps * self.runner.order
            errors.append(block_norms(end - self.ends[i]) / block_norm(self.ends[i]))
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
