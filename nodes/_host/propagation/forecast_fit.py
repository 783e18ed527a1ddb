"""Fit forecasts on a model: one recorded run tells which steps to ask, a short one what the others say."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....kernels.fitted_sampler import fidelity
from ....kernels.forecast import (
    MOST_ANSWERS,
    Asked,
    Kinds,
    aim,
    climb,
    expected_error,
    fit_weights,
    forecast,
    forecast_errors,
    mean_products,
    neighbours,
    one_sided_errors,
    optimal_kinds,
)
from ....kernels.propagation import Reuse, step_weights
from ....models.calibration import KeySteps, Point
from ..._plan.propagation import CALIBRATED, ReuseSettings
from ..live import Interim
from ..session import check_numbers
from ..setting import guidance_of
from . import OneSided, WholeSteps, applied, outer_sample
from .guidance import why_not_one_sided

TRIED_SPEEDS = (1.25, 1.33, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0)
SEARCHED_FROM = 3.0  # times faster: where more is asked the programme's sums rank well, ...
SEARCHED_BELOW = 50.0  # dB: ... unless the run is one that no plan follows closely, as at a high cfg over few steps
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
            self.changes = changes
            if why_not_one_sided(guider, self.noise) is not None:
                return None
            return OneSided(frozenset(kinds.one_sided), frozenset(kinds.keys), changes, self.space)

        def answer(self, ask, x):
            step, asked = self.step, self.step in kinds.keys
            goal = ask() if asked else self.goal(step, x)
            if step == self.last:  # a start of ours asks at the first level before the run
                self.past.pop()
            if step in self.changes:
                self.past.clear()
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


class Programme:
    """What a recorded run tells of every plan of steps: its cost and its expected error."""

    def __init__(self, run: Any):
        self._steps, self._changes = run.plan.steps, run.changes
        heard = [run.heard[i] for i in range(self._steps)]
        products = mean_products([*(one.x for one in heard), *(one.answer for one in heard)])
        check_numbers(products)
        reach = max(min(FURTHEST_ASKED, self._steps - 2), self._steps // 4)
        self._forecasts = forecast_errors(products, reach, reach - 1)
        self._sided = None
        if run.overheard is not None and len(run.overheard.e) == self._steps:
            differences = mean_products([run.overheard.e[i] for i in range(self._steps)])
            self._sided = one_sided_errors(differences, run.plan.sigmas, run.cfg, run.space, self._forecasts)
        self._weights = step_weights(run.plan.sigmas, run.space)
        answers = products[self._steps :, self._steps :]
        moved = [answers[i, i] + answers[i - 1, i - 1] - 2 * answers[i, i - 1] for i in range(1, self._steps)]
        self.changed = [float((m.clamp(min=0) / answers[i, i]).sqrt()) for i, m in enumerate(moved, start=1)]

    def plans(self, speeds: Iterable[float]) -> list[Kinds]:
        """The best steps to ask for each of the speeds, without and with one-sided ones: the sums rank plans of one
        family better than of both."""
        found: list[Kinds] = []
        for sided in dict.fromkeys((None, self._sided)):
            best = optimal_kinds(self._forecasts, sided, self._weights, self._changes).values()
            for speed in speeds:
                fast = [kinds for kinds in best if self._steps / kinds.cost() >= speed]
                found += [min(fast, key=lambda kinds: kinds.error)] if fast else []
        return [*dict.fromkeys(found)]

    def around(self, kinds: Kinds) -> list[Kinds]:
        return neighbours(kinds, self._steps, self._changes)

    def expected(self, kinds: Kinds) -> float:
        return expected_error(kinds, self._forecasts, self._sided, self._weights)


def fit_forecasts(
    model: Any, run: Callable[[Any, int], Tensor], solver: str, levels: Tensor, fastest: float, seed: int,
    search: int = 0,
) -> Generator[Interim, None, tuple[KeySteps, dict[str, list[float]]]]:  # fmt: skip
    """Record, plan, fit each plan's forecasts, try them on another noise; yields what it does, how far, and what it
    would return by then.

    run: a MODEL and a seed to the latents that it samples over `levels`. search: short runs of hill climbing from each
    plan of SEARCHED_FROM and faster, or below SEARCHED_BELOW; what it finds is kept where the other noise prefers it,
    too. Returns the calibration (settings that no other beats in speed and fidelity) and how much the answer changes.
    ValueError where a run passes levels by.
    """
    yield "recording a whole run", 0.0, None
    fit = Fit(model, lambda patched: run(patched, seed), solver, levels)
    plans = fit.programme.plans([one for one in TRIED_SPEEDS if one <= fastest])
    if not plans:
        raise ValueError(
            f"With so few steps no setting is {TRIED_SPEEDS[0]:g} times faster: raise 'steps' or 'fastest'."
        )
    changed = {"answer": fit.programme.changed}
    yield "drawing another noise whole, to try them on", 0.1, (fit.keys, changed)
    whole = run(model, seed + 1)
    points: list[Point] = []
    for number, kinds in enumerate(plans):
        share = lambda part, number=number: 0.2 + 0.8 * (number + part) / len(plans)
        yield f"fitting {number + 1} of {len(plans)} settings", share(0), (best_of(fit.keys, points), changed)
        wanted = fit.steps / kinds.cost() >= SEARCHED_FROM or fit.point(kinds).psnr < SEARCHED_BELOW
        tries = search if wanted else 0
        for found in dict.fromkeys([kinds, (yield from fit.climbed(kinds, tries, share))]):
            points.append(_tried(fit.point(found), fit, lambda patched: run(patched, seed + 1), whole))
    return best_of(fit.keys, points), changed


def _tried(trial: Point, fit: Fit, run: Callable[[Any], Tensor], whole: Tensor) -> Point:
    """A setting with what it gave on another noise than it was fitted to: fidelity, and the errors of its key steps."""
    kind, seen = trying()
    settings = ReuseSettings(CALIBRATED, calibration=replace(fit.keys, points=(trial,)))
    psnr = fidelity(run(_with(fit.model, kind, settings)), whole)
    errors = [float(seen[0].get(i, torch.zeros(())).nan_to_num(1.0, 1.0)) for i in range(fit.steps)]
    return replace(trial, psnr=psnr, errors=tuple(round(error, 4) for error in errors))


class Fit:
    """One recorded run, and short runs fitted to it. run: a MODEL to the latents that it samples over `levels`; whole:
    those of the recorded run; keys: a calibration without settings."""

    def __init__(self, model: Any, run: Callable[[Any], Tensor], solver: str, levels: Tensor):
        self.model, self._run, self.steps = model, run, len(levels) - 1
        self.keys = KeySteps(1, solver, tuple(levels.tolist()), (), guidance_of(model.model_options))
        kind, runs = listening()
        self.whole = run(_with(model, kind))
        recorded = _heard_whole(runs, solver, self.steps)
        self._heard, self.programme = recorded.heard, Programme(recorded)
        self._points: dict[tuple, Point] = {}

    def point(self, kinds: Kinds) -> Point:
        """A setting whose forecasts are fitted to the recorded run; psnr: to that run itself."""
        if kinds.asked not in self._points:
            kind, runs = fitting(kinds, self._heard)
            psnr = fidelity(self._run(_with(self.model, kind)).float(), self.whole.float())
            self._points[kinds.asked] = Point(
                NO_FEATURES, kinds.keys, self.steps / kinds.cost(), psnr, kinds.one_sided, tuple(runs[0].weights),
                (math.inf,) * self.steps,
            )  # fmt: skip
        return self._points[kinds.asked]

    def climbed(
        self, start: Kinds, tries: int, share: Callable[[float], float]
    ) -> Generator[Interim, None, Kinds]:  # fmt: skip
        """The best plan that so many short runs find from `start` on, by the end of the recorded run."""
        search = climb(start, self.programme.around, self.programme.expected, tries)
        try:
            tried = next(search)
            for count in range(tries + 1):
                psnr = self.point(tried).psnr
                yield f"searching from there: {count} of {tries}, {psnr:.1f} dB", share(count / (tries + 1)), None
                tried = search.send(psnr)
        except StopIteration as end:
            return end.value
        raise AssertionError("the search goes on")


def forecasting(
    model: Any, run: Callable[[Any], Tensor], solver: str, levels: Tensor, speed: float
) -> tuple[Tensor, Any, Kinds]:  # fmt: skip
    """What `run` draws whole, a clone of the MODEL that draws the like so many times faster, and the steps it asks.

    run: a MODEL to the latents that it samples over `levels`. The forecasts are tried on nothing else.
    """
    fit = Fit(model, run, solver, levels)
    plans = fit.programme.plans([speed])
    if not plans:
        raise ValueError(
            f"A run of {fit.steps} steps cannot be made {speed:g} times faster: lower 'speed', or raise 'steps'."
        )
    kinds = max(plans, key=lambda kinds: fit.point(kinds).psnr)
    settings = ReuseSettings(CALIBRATED, calibration=replace(fit.keys, points=(fit.point(kinds),)))
    return fit.whole, applied(model, WholeSteps, settings), kinds


def _heard_whole(runs: list[Any], solver: str, steps: int) -> Any:
    """The run that was listened to; ValueError where it passed levels by."""
    (recorded,) = runs
    if len(recorded.heard) != steps:
        raise ValueError(
            f"The sampler '{solver}' asks the model at other levels than those of its schedule: set 'reuse' to another "
            "part, or choose 'euler' or 'dpmpp_2m' in 'sampler_name'."
        )
    return recorded


def beats(a: Point, b: Point) -> bool:
    return a.speed >= b.speed and a.psnr >= b.psnr and (a.speed, a.psnr) != (b.speed, b.psnr)


def best_of(keys: KeySteps, points: Sequence[Point]) -> KeySteps:
    """A calibration with those settings that no other beats in speed and fidelity, the slowest first."""
    kept = sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: p.speed)
    return replace(keys, points=tuple(kept))


def _with(model: Any, kind: type[WholeSteps], settings: ReuseSettings | None = None) -> Any:
    return applied(model, kind, settings or ReuseSettings(), {WrappersMP.OUTER_SAMPLE: outer_sample(kind)})
