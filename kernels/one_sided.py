"""One-sided steps: the positive is asked, and what the negative would have answered is predicted from it.

Classifier-free guidance asks a network twice a step. The difference of the two answers, in units of the noise, moves
slowly: e = (D_cond - D_uncond) / sigma. On a one-sided step it is taken from the last two whole steps, half way along
their line in log-SNR, and D_uncond = D_cond - sigma e follows from the fresh D_cond. Adaptive Guidance (Castillo et al.
2025, arXiv 2312.12487) predicts scores from past scores alone; the fresh conditional answer is what keeps this near.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .space import NoiseSpace
from .types import Latent

FIRST_WHOLE, LAST_WHOLE = 3, 3  # steps at both ends that ask both, for the prompt turns first and errors stay last
DAMPED = 0.5  # of the line through the last two differences; measured: 0.4 to 0.6 alike, 0 and 1 are worse
MISTRUSTED = 1.0  # an error as large as the difference itself: the prediction was worth nothing


def one_sided_steps(steps: int, barred: Container[int], keys: Container[int], last: int) -> frozenset[int]:
    """Never one of `barred`, of the first FIRST_WHOLE or of the `last`. Of `keys`, the steps on which the network runs
    whole, every second at most; of the others, which reuse features, each, for their own differences are poor."""
    chosen: set[int] = set()
    for i in range(FIRST_WHOLE, steps - last):
        if i not in barred and (i not in keys or (i - 1 in keys and i - 1 not in chosen)):
            chosen.add(i)
    return frozenset(chosen)


@dataclass(frozen=True)
class Difference:
    """What guidance adds at one step: e [b ...], in units of the noise. sides: names the prompts that were compared."""

    step: int
    sigma: float
    sides: Hashable
    e: Latent


class Differences:
    """The last two differences of every context window, and how wrong the last prediction would have been."""

    def __init__(self, space: NoiseSpace):
        self._space = space
        self._past: dict[Hashable, deque[Difference]] = {}
        self._wrong: dict[Hashable, Tensor] = {}

    def keep(self, window: Hashable, now: Difference) -> None:
        """Note the difference of a whole step; what was predicted for it is compared with it."""
        past = self._past.setdefault(window, deque(maxlen=2))
        if past and not self._goes_on(past[-1], now):
            past.clear()
        if past and math.isclose(past[-1].sigma, now.sigma, rel_tol=1e-5):  # a solver that asks twice
            past.pop()
        self._wrong.pop(window, None)
        if past:
            missed = now.e - self._at(past, now.sigma)
            self._wrong[window] = (_lengths(missed) / _lengths(now.e)).nan_to_num(0.0).max()
        past.append(now)

    def predict(self, window: Hashable, since: int, sigma: float, sides: Hashable, like: Latent) -> Latent | None:
        """e at `sigma`; None where nothing was kept at step `since` or later, it was of other prompts, or it was
        predicted badly. The last waits for the device: for a number of the step before.
        """
        past = self._past.get(window)
        if not past or past[-1].step < since or not self._goes_on(past[-1], Difference(since, sigma, sides, like)):
            return None
        wrong = self._wrong.get(window)
        return None if wrong is not None and float(wrong) > MISTRUSTED else self._at(past, sigma)

    def clear(self) -> None:
        self._past.clear()
        self._wrong.clear()

    def _at(self, past: deque[Difference], sigma: float) -> Latent:
        last = past[-1]
        weight = line_weight(self._space, sigma, last.sigma, past[0].sigma) if len(past) > 1 else 0.0
        return torch.lerp(past[0].e, last.e, 1 + weight) if weight else last.e

    @staticmethod
    def _goes_on(last: Difference, now: Difference) -> bool:
        falls = now.sigma <= last.sigma * (1 + 1e-5)
        return falls and now.sides == last.sides and now.e.shape == last.e.shape and now.e.dtype == last.e.dtype


def _lengths(e: Latent) -> Tensor:
    """[b]: of each item, so that one that is predicted badly is not hidden by the others of its batch."""
    return e.flatten(1).float().norm(dim=1)


def line_weight(space: NoiseSpace, sigma: float, last: float, before: float) -> float:
    """How far to go on along the line from the difference at `before` to that at `last`, to be at `sigma`."""
    now, one, two = space.log_ratio(torch.tensor([sigma, last, before], dtype=torch.float64)).tolist()
    if not (one < two and now < one) or math.isinf(two):
        return 0.0
    return DAMPED * min((one - now) / (two - one), 1.0)
