"""Fit forecasts on a model: one recorded run tells which steps to ask, a short one what the others say."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....kernels.fitted_sampler import EQUAL, fidelity
from ....kernels.forecast import (
    MOST_ANSWERS,
    Asked,
    Kinds,
    aim,
    fit_weights,
    forecast,
    forecast_errors,
    mean_products,
    one_sided_errors,
    optimal_kinds,
)
from ....kernels.propagation import Reuse, step_weights
from ....models.calibration import KeySteps, Point
from ..._plan.propagation import CALIBRATED, ReuseSettings
from . import OneSided, WholeSteps, applied, outer_sample
from .guidance import why_not_one_sided

TRIED_SPEEDS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0)
FURTHEST_ASKED = 12  # steps from one asked step to the next, at most, or a quarter of a long run
NO_FEATURES = Reuse(0, 1)  # of features: the steps in between compute none


class _Overheard(OneSided):
    """Asks both sides on every step and keeps their difference, in units of the noise, in main memory."""

    def __init__(self) -> None:
        self.e: dict[int, Tensor] = {}

    def begin(self, step):
        pass

    close = lambda self: None

    def answers(self, ask, conds, x, options, clock):
        answers = ask(conds)
        if len(conds) == 2 and all(conds) and clock.on_grid and clock.step not in self.e:
            self.e[clock.step] = ((answers[0] - answers[1]) / clock.sigma).float().cpu()
        return answers


def listening() -> tuple[type[WholeSteps], list[Any]]:
    """A run's class that asks every step and keeps what passes by, and the list that its runs are added to."""
    runs: list[Any] = []

    class Recorded(WholeSteps):
        def __init__(self, *args):
            self.heard: dict[int, Asked] = {}
            self.overheard: _Overheard | None = None
            super().__init__(*args)
            runs.append(self)

        def sides(self, guider, changes, active):
            windowed = guider.model_options.get("context_handler") is not None  # each window has its own difference
            self.cfg = getattr(guider, "cfg", 1.0)
            if why_not_one_sided(guider, self.noise) is None and not windowed:
                self.overheard = _Overheard()
            self.changes = changes
            return self.overheard

        def answer(self, ask, x):
            answer = ask()
            if self.clock.on_grid:
                self.heard[self.step] = Asked(x.detach().float().cpu(), answer.detach().float().cpu())
            return answer

        def announce(self):
            pass

        report = announce

    return Recorded, runs


def fitting(kinds: Kinds, recorded: dict[int, Asked]) -> tuple[type[WholeSteps], list[Any]]:
    """A run's class that asks the steps of `kinds` and fits the forecasts of the others as it goes; its runs.

    weights: as a `Point` holds them.
    """
    runs: list[Any] = []

    class Fitting(WholeSteps):
        def __init__(self, *args):
            super().__init__(*args)
            self.past: list[Asked] = []
            self.last: int | None = None
            self.weights: list[tuple[float, ...]] = [()] * self.plan.steps
            runs.append(self)

        def sides(self, guider, changes, active):
            if why_not_one_sided(guider, self.noise) is not None:
                return None
            return OneSided(frozenset(kinds.one_sided), frozenset(kinds.keys), changes, self.space)

        def answer(self, ask, x):
            step, asked = self.step, self.step in kinds.keys
            goal = ask() if asked else self.goal(step, x)
            if step == self.last:  # a start of ours asks at the first level before the run
                self.past.pop()
            if self.past:
                self.weights[step] = fit_weights(goal, x, self.past)
                if not asked:
                    return forecast(self.weights[step], x, self.past)
            self.last, self.past = step, [*self.past, Asked(x.clone(), goal.clone())][-MOST_ANSWERS:]
            return goal

        def goal(self, step, x):
            there = recorded[step]
            like = Asked(there.x.to(x), there.answer.to(x))
            return aim(x, like, self.plan.sigmas[step], self.plan.sigmas[step + 1])

        def close(self):
            super().close()
            self.past.clear()

        def announce(self):
            pass

        report = announce

    return Fitting, runs


def trying() -> tuple[type[WholeSteps], list[dict[int, Tensor]]]:
    """A run's class as users run it, and how wrong the forecasts of its key steps were, run by run."""
    seen: list[dict[int, Tensor]] = []

    class Trying(WholeSteps):
        def close(self):
            if self.forecasts is not None:
                seen.append(self.forecasts.errors)
            super().close()

        def announce(self):
            pass

        report = announce

    return Trying, seen


def plans_of(run: Any, speeds: Iterable[float]) -> tuple[list[Kinds], list[float]]:
    """From a recorded run the best steps to ask for each of the speeds, without and with one-sided ones, and how much
    its answer changes from step to step."""
    steps = run.plan.steps
    heard = [run.heard[i] for i in range(steps)]
    products = mean_products([*(one.x for one in heard), *(one.answer for one in heard)])
    reach = max(min(FURTHEST_ASKED, steps - 2), steps // 4)
    errors = forecast_errors(products, reach, reach - 1)
    sided = None
    if run.overheard is not None and len(run.overheard.e) == steps:
        differences = mean_products([run.overheard.e[i] for i in range(steps)])
        sided = one_sided_errors(differences, run.plan.sigmas, run.cfg, run.space, errors)
    weights = step_weights(run.plan.sigmas, run.space)
    found: list[Kinds] = []
    for halved in (None, sided)[: 1 + (sided is not None)]:  # the sums rank plans of one family better than of both
        best = optimal_kinds(errors, halved, weights, run.changes).values()
        for speed in speeds:
            fast = [kinds for kinds in best if steps / kinds.cost() >= speed]
            found += [min(fast, key=lambda kinds: kinds.error)] if fast else []
    answers = products[steps:, steps:]
    moved = [answers[i, i] + answers[i - 1, i - 1] - 2 * answers[i, i - 1] for i in range(1, steps)]
    return [*dict.fromkeys(found)], [
        float((m.clamp(min=0) / answers[i, i]).sqrt()) for i, m in enumerate(moved, start=1)
    ]


def fit_forecasts(
    model: Any, run: Callable[[Any, int], Tensor], solver: str, levels: Tensor, fastest: float, seed: int
) -> Generator[tuple[str, float], None, tuple[KeySteps, dict[str, list[float]]]]:  # fmt: skip
    """Record, plan, fit each plan's forecasts, try them on another noise; yields what it does and how far.

    run: a MODEL and a seed to the latents that it samples over `levels`. Returns the calibration (settings that no
    other beats in speed and fidelity) and how much the answer changes. ValueError where a run passes levels by.
    """
    sigmas, steps = levels.tolist(), len(levels) - 1
    yield "recording a whole run", 0.0
    kind, runs = listening()
    run(_with(model, kind), seed)
    recorded = _heard_whole(runs, solver, steps)
    plans, changed = plans_of(recorded, [one for one in TRIED_SPEEDS if one <= fastest])
    if not plans:
        raise ValueError(f"No setting of so few steps is {TRIED_SPEEDS[0]:g} times faster: raise 'steps' or 'fastest'.")
    yield "drawing another noise whole, to try them on", 0.1
    whole = run(model, seed + 1)
    found, points = KeySteps(1, solver, tuple(sigmas), ()), []
    for number, kinds in enumerate(plans):
        yield f"fitting {number + 1} of {len(plans)} settings", 0.2 + 0.8 * number / len(plans)
        kind, runs = fitting(kinds, recorded.heard)
        run(_with(model, kind), seed)
        trial = Point(
            NO_FEATURES, kinds.keys, steps / kinds.cost(), EQUAL, kinds.one_sided, tuple(runs[0].weights),
            (math.inf,) * steps,
        )  # fmt: skip
        trying_kind, seen = trying()
        settings = ReuseSettings(CALIBRATED, calibration=replace(found, points=(trial,)))
        psnr = fidelity(run(_with(model, trying_kind, settings), seed + 1), whole)
        errors = [float(seen[0].get(i, torch.zeros(())).nan_to_num(1.0, 1.0)) for i in range(steps)]
        points.append(replace(trial, psnr=psnr, errors=tuple(round(error, 4) for error in errors)))
    kept = sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: p.speed)
    return replace(found, points=tuple(kept)), {"answer": changed}


def forecasting(
    model: Any, run: Callable[[Any], Tensor], solver: str, levels: Tensor, speed: float
) -> tuple[Tensor, Any, Kinds]:
    """What `run` draws whole, a clone of the MODEL that draws the like so many times faster, and the steps it asks.

    run: a MODEL to the latents that it samples over `levels`. The forecasts are tried on nothing else.
    """
    sigmas, steps = levels.tolist(), len(levels) - 1
    kind, runs = listening()
    whole = run(_with(model, kind))
    recorded = _heard_whole(runs, solver, steps)
    plans, _ = plans_of(recorded, [speed])
    if not plans:
        raise ValueError(f"No {steps} steps are {speed:g} times faster: lower 'speed', or raise 'steps'.")
    tried: list[tuple[float, Kinds, tuple]] = []
    for kinds in plans:
        kind, runs = fitting(kinds, recorded.heard)
        psnr = fidelity(run(_with(model, kind)).float(), whole.float())
        tried.append((psnr, kinds, tuple(runs[-1].weights)))
    psnr, kinds, weights = max(tried, key=lambda one: one[0])
    point = Point(
        NO_FEATURES, kinds.keys, steps / kinds.cost(), psnr, kinds.one_sided, weights, (math.inf,) * steps
    )  # fmt: skip
    settings = ReuseSettings(CALIBRATED, calibration=KeySteps(1, solver, tuple(sigmas), (point,)))
    return whole, applied(model, WholeSteps, settings), kinds


def _heard_whole(runs: list[Any], solver: str, steps: int) -> Any:
    """The run that was listened to; ValueError where it passed levels by."""
    (recorded,) = runs
    if len(recorded.heard) != steps:
        raise ValueError(
            f"The sampler '{solver}' does not ask the model once at every level: set 'reuse' to another part, or "
            "choose 'euler' or 'dpmpp_2m' in 'sampler_name'."
        )
    return recorded


def beats(a: Point, b: Point) -> bool:
    return a.speed >= b.speed and a.psnr >= b.psnr and (a.speed, a.psnr) != (b.speed, b.psnr)


def _with(model: Any, kind: type[WholeSteps], settings: ReuseSettings | None = None) -> Any:
    return applied(model, kind, settings or ReuseSettings(), {WrappersMP.OUTER_SAMPLE: outer_sample(kind)})
