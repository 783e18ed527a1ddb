"""Steps of a run on which nothing is asked, between the solver and the host's guided model."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import Tensor

from ....kernels.forecast import MOST_ANSWERS, Asked, forecast, missed
from ....models.calibration import KeySteps, Point
from ..._plan.propagation import place_in, said_of
from ..._plan.solvers import table_name
from ..clock import Clock
from ..solvers import on_grid, solver_name

DOUBTED = 2.0  # times the error that the fit expected on a key step: the next step is asked, too
LEAST_ERROR = 0.02  # of what happened since the last answer, below which no error is doubted


class Forecasts:
    """Of one run, whose steps are those of the fitted run from `start` on."""

    def __init__(self, fit: KeySteps, point: Point, start: int, steps: int, changes: Container[int]):
        self._fit, self._point, self._start, self._steps, self._changes = fit, point, start, steps, changes
        own = lambda many: frozenset(i - start for i in many if 0 <= i - start < steps)
        self.keys, self.one_sided = own(point.keys), own(point.one_sided)
        self.saved = self.missing = self.doubted = 0
        self._past: list[tuple[int, Asked]] = []
        self._wrong: tuple[Tensor, float] | None = None
        self.errors: dict[int, Tensor] = {}  # of the fitted run's key steps, as this run has seen them

    def said(self) -> str:
        """What the run is about to do, for the log."""
        keys, alone = len(self.keys), len(self.one_sided)
        times = self._steps / max(keys - alone / 2, 0.5)
        return (
            f"{said_of(self._point, self._fit)}; the network is asked on {keys} of {self._steps} steps "
            f"({' '.join(map(str, sorted(self.keys)))}), on {alone} of these for the positive prompt alone, and on the "
            f"others its answer is forecast: {times:.2f} times less computing"
        )

    def done(self) -> str:
        """What the run did."""
        return (
            f"{self.saved} steps were forecast; {self.missing} were asked in their place because the run begins inside "
            f"the fitted one or its prompts change there, {self.doubted} because the forecast of the step before was "
            f"more than {DOUBTED:g} times as wrong as when it was fitted"
        )

    def close(self) -> None:
        self._past.clear()
        self._wrong = None

    def answer(self, ask: Callable[[], Tensor], x: Tensor, clock: Clock) -> Tensor:
        """The guided model's answer at x: asked on a key step, else forecast."""
        if clock.step is None:
            return ask()
        if clock.step in self._changes:  # what was answered before tells of other prompts
            self.close()
        step = clock.step + self._start
        said = self._said(step, x)
        if clock.step in self.keys:
            answer = ask()
            if said is not None:
                self.errors[step] = missed(said, answer, self._past[-1][1].answer)
                self._wrong = self.errors[step], self._point.errors[step]
            before = [one for one in self._past if one[0] != step]  # a start of ours asks at the first level, too
            self._past = [*before, (step, Asked(x.clone(), answer.clone()))][-MOST_ANSWERS:]
            return answer
        if said is None:
            self.missing += 1
            return ask()
        if self._is_doubted():
            self.doubted += 1
            return ask()
        self.saved += 1
        return said

    def _said(self, step: int, x: Tensor) -> Tensor | None:
        """The forecast at a step of the fitted run; None where what it is made of was not asked in this run."""
        weights = self._point.weights[step]
        if not weights:
            return None
        past = self._past[1 - len(weights) :]  # fewer behind a change of the fitted run's prompts
        if [i for i, _ in past] != [key for key in self._point.keys if key < step][1 - len(weights) :]:
            return None
        return forecast(weights, x, [one for _, one in past])

    def _is_doubted(self) -> bool:
        """Whether the last key step told of a poor forecast; once for each, and it waits for the device then."""
        if self._wrong is None:
            return False
        (wrong, expected), self._wrong = self._wrong, None
        return float(wrong) > DOUBTED * max(expected, LEAST_ERROR)


def can_forecast(sampler: Any) -> bool:
    """Whether a SAMPLER asks once a step, and nothing beside the guided answer: CFG++ overhears the negative's, too."""
    return on_grid(sampler) and not solver_name(sampler).endswith("cfg_pp")


def forecasts_of(
    fit: KeySteps, point: Point, sampler: Any, sigmas: Sequence[float], changes: Container[int] = ()
) -> Forecasts | str:
    """The forecasts of a run over `sigmas` by a setting of `fit`, or why there are none, in the user's words."""
    name = solver_name(sampler)
    if not can_forecast(sampler) or name != table_name(fit.solver):
        return f"the profile's forecasts are fitted to {fit.solver}, and the run has {name}"
    start = place_in(fit.sigmas, sigmas)
    if start is None:
        return (
            f"the profile's forecasts are fitted to {len(fit.sigmas) - 1} steps of its own schedule, and the run has "
            f"{len(sigmas) - 1} of another: choose its scheduler and steps, or fit again"
        )
    return Forecasts(fit, point, start, len(sigmas) - 1, changes)
