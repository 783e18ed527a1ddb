"""Steps of a run on which the positive alone is asked, between the host's guider and its batches of conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import comfy.samplers
from torch import Tensor

from ....kernels.one_sided import LAST_WHOLE, Difference, Differences, one_sided_steps
from ....kernels.propagation import ReusePlan
from ....kernels.space import NoiseSpace
from ..clock import Clock

OTHERS_FUNCTION = "sampler_calc_cond_batch_function"


def why_not_one_sided(guider: Any, noise: Tensor) -> str | None:
    """Why the negative of a run cannot be predicted, in the user's words; None when it can."""
    if noise.shape[2:].numel() < 2:
        return "a latent of one pixel cannot be asked about alone"  # the norms of a UNet need two numbers
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        return f"the guider {type(guider).__name__} does not ask one positive and one negative"
    if math.isclose(guider.cfg, 1.0) or not guider.conds.get("negative"):
        return "there is no negative to save at cfg 1 or without a negative prompt"
    if OTHERS_FUNCTION in guider.model_options:
        return "another node on the MODEL asks the prompts itself"
    return None


def alternating(plan: ReusePlan, changes: Container[int], last: int, active: Container[int]) -> frozenset[int]:
    """The steps of a run that ask the positive alone without a fit. changes: where the conditioning does."""
    inactive = (i for i in range(plan.steps) if i not in active)
    barred = {*plan.captured, *(i for i in range(plan.steps) if i in changes), *inactive}
    return one_sided_steps(plan.steps, barred, plan.keys, max(last, LAST_WHOLE) if plan.sigmas[-1] == 0 else 0)


class OneSided:
    """Of one run. steps: those that ask the positive alone; asked: those that are asked at all, and whose differences
    are kept where they ask both. saved, missing: calls that asked the positive alone, and that could not."""

    def __init__(self, steps: frozenset[int], asked: frozenset[int], changes: Container[int], space: NoiseSpace):
        self.steps, self.two_sided = steps, sorted(asked - steps)
        self.saved = self.missing = 0
        self._changes = changes
        self._past = Differences(space)
        self._asked: set[Any] = set()

    def begin(self, step: int | None) -> None:
        """An evaluation of the guided model begins."""
        self._asked.clear()
        if step is not None and step in self._changes:
            self._past.clear()

    def close(self) -> None:
        self._past.clear()

    def answers(
        self, ask: Callable[[list], list], conds: list, x: Tensor, options: dict, clock: Clock
    ) -> list[Tensor]:  # fmt: skip
        """Both answers of an evaluation, [b ...] each; `ask(conds)` asks the network.

        The first call of an evaluation is the guider's, with the positive before the negative, once in every context
        window; patches of other packs may ask again, and are left alone.
        """
        window = _window(options)
        if clock.step is None or len(conds) != 2 or not all(conds) or window in self._asked:
            return ask(conds)
        self._asked.add(window)
        step, sigma = clock.step, clock.sigma
        sides = tuple(_active(side, sigma) for side in conds)
        if step in self.steps:
            since = max((i for i in self.two_sided if i < step), default=step)
            e = self._past.predict(window, since, sigma, sides, x)
            if e is not None:
                self.saved += 1
                positive = ask([conds[0], None])[0]
                return [positive, positive - sigma * e]
            self.missing += 1
        positive, negative = ask(conds)
        if step in self.two_sided:
            self._past.keep(window, Difference(step, sigma, sides, (positive - negative) / sigma))
        return [positive, negative]


def _window(options: dict) -> tuple[int, ...]:
    """The frames of the context window that is asked, () without any."""
    return tuple(getattr(options["transformer_options"].get("context_window"), "index_list", None) or ())


def _active(side: list[dict], sigma: float) -> tuple:
    """The ids of the conditions of one side that count at `sigma`."""
    return tuple(
        cond.get("uuid")
        for cond in side
        if cond.get("timestep_end", -math.inf) <= sigma <= cond.get("timestep_start", math.inf)
    )
