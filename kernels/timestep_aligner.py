"""Align the timestep that a first-order solver conditions its network on (after Xia et al. 2023, arXiv 2310.09469).

A step of Euler (DDIM) from sigma to sigma_next holds the network's answer at its start; told a level tau of its own,
the network answers for the step as a whole. The paper picks tau so that the answers of neighbouring steps agree, which
does not tend to tau = sigma as the steps shrink. Here tau brings the step as near as possible to the exact path of the
same noise: one number a step, no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import ConditioningMap
from .space import NoiseSpace
from .types import Latent, Sigma, Sigmas

# x, sigma, sigma_cond (what the network is told) -> denoised
ToldDenoiser: TypeAlias = Callable[[Latent, Sigma, Sigma], Latent]

LEAST_STEP_GAIN = 0.01  # of a step's deviation; below it the step keeps its true level
RANGE = (0.2, 1.3)  # tau / sigma, on flow the ratio of their odds
COARSE, FINE = 9, 6
CALLS_PER_STEP = COARSE + FINE  # calls of the network for each step and noise, at most
BLOCK = 8  # latent pixels


@dataclass(frozen=True)
class Trajectory:
    """The path of one noise through many small steps: states [m+1 ...] at sigmas [m+1] and slopes dx/dsigma there."""

    sigmas: Sigmas
    states: Latent
    slopes: Latent

    @classmethod
    def recorded(cls, sigmas: Sigmas, states: Sequence[Latent], denoised: Sequence[Latent]) -> Trajectory:
        """From m+1 states and the m denoised at all but the last: dx/dsigma = (x - denoised) / sigma.

        A last step to 0 is a straight line for every solver, so its end has the slope of its start.
        """
        slopes = [(x - d) / sigma for x, d, sigma in zip(states, denoised, sigmas.tolist(), strict=False)]
        return cls(sigmas, torch.stack(list(states)), torch.stack([*slopes, slopes[-1]]))

    @property
    def end(self) -> Latent:
        return self.states[-1]

    def at(self, sigma: float) -> Latent:
        """The state at any level between the ends, by the cubic Hermite polynomial in sigma."""
        levels = self.sigmas.tolist()
        i = next((i for i, level in enumerate(levels[1:]) if level <= sigma), len(levels) - 2)
        h = levels[i + 1] - levels[i]
        t = min(max((sigma - levels[i]) / h, 0.0), 1.0)
        return (
            (2 * t**3 - 3 * t**2 + 1) * self.states[i] + (t**3 - 2 * t**2 + t) * h * self.slopes[i]
            + (3 * t**2 - 2 * t**3) * self.states[i + 1] + (t**3 - t**2) * h * self.slopes[i + 1]
        )  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """sigma_cond [n] for the first level of each of n steps, and by how much each step came nearer to the path [n]."""

    sigma: tuple[float, ...]
    sigma_cond: tuple[float, ...]
    gain: tuple[float, ...]

    @property
    def changes(self) -> bool:
        return self.sigma != self.sigma_cond

    def through(self, space: NoiseSpace) -> ConditioningMap | None:
        """The map through all knots inside the range; None where nothing is changed."""
        if not self.changes:
            return None
        return ConditioningMap.through(space, *self.knots(space))

    def knots(self, space: NoiseSpace) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """sigma and sigma_cond, ascending; a flow's 1 maps to itself and is no knot."""
        top = math.inf if space.kind == "ve" else 1.0
        inside = [(s, cond) for s, cond in zip(self.sigma, self.sigma_cond, strict=True) if 0 < s < top][::-1]
        return tuple(s for s, _ in inside), tuple(cond for _, cond in inside)


def block_norm(x: Latent) -> float:
    """The mean 2-norm of the blocks of x.

    A mean of norms, not of squares: a few blocks that settle on another content would rule a mean square.
    """
    return float(block_norms(x).mean())


def block_norms(x: Latent) -> Tensor:
    """The 2-norm of each block of x, [b blocks]: 8x8 latent pixels with all channels and frames; a row of a plain [b d]
    is one block."""
    if x.ndim <= 2:
        return x.reshape(len(x), -1).norm(dim=1, keepdim=True)
    squares = x.float().square().flatten(1, -3).sum(dim=1, keepdim=True)  # [b 1 h w]
    return F.avg_pool2d(squares, BLOCK, ceil_mode=True, divisor_override=1).sqrt().flatten(1)


def align(
    denoise: ToldDenoiser, sigmas: Sigmas, paths: Sequence[Trajectory], space: NoiseSpace, highest: float = math.inf
) -> Generator[int, None, Alignment]:
    """Fit tau for every step of Euler on `sigmas` to the exact `paths`, one per noise; yields the calls made so far.

    Step by step, each from the state that the aligned steps before it have reached, by 15 candidates. The true level
    stays unless the mean deviation from the path falls by more than 1 %. `highest`: the highest level the network
    knows.
    """
    states = [path.at(float(sigmas[0])) for path in paths]
    calls, chosen, gains = 0, [], []
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        targets = [path.at(sigma_next) for path in paths]

        def deviation(reached: list[Latent], targets: list[Latent] = targets) -> float:
            return sum(block_norm(x - target) for x, target in zip(reached, targets, strict=True))

        search = search_tau(euler_step(denoise, states, sigma, sigma_next), deviation, sigma, space, highest)
        while True:
            try:
                next(search)
            except StopIteration as end:
                tau, states, least, plain = end.value
                break
            calls += len(paths)
            yield calls
        chosen.append(tau)
        gains.append(1 - least / plain if plain else 0.0)
    return Alignment(tuple(sigmas.tolist()[:-1]), tuple(chosen), tuple(gains))


def search_tau(
    step: Callable[[float], list[Latent]],
    loss: Callable[[list[Latent]], float],
    sigma: float,
    space: NoiseSpace,
    highest: float,
) -> Generator[None, None, tuple[float, list[Latent], float, float]]:
    """The tau with the least loss(step(tau)), the states it reaches, its loss and that of tau = sigma.

    9 candidates in ln(sigma / alpha), the true level first, then 6 around the best; yields after each. A flow's 1 has
    no other level.
    """
    tau, best = sigma, step(sigma)
    plain = least = loss(best)
    score = {0.0: plain}
    yield
    for offsets in (_coarse, _bracket):
        for offset in offsets(score) if space.kind == "ve" or sigma < 1 else []:
            candidate = float(space.at_log_ratio(space.log_ratio(torch.tensor(sigma).double()) + offset))
            if candidate > highest:
                continue
            reached = step(candidate)
            score[offset] = loss(reached)
            if score[offset] < min(least, (1 - LEAST_STEP_GAIN) * plain):
                tau, best, least = candidate, reached, score[offset]
            yield
    return tau, best, least, plain


def euler_step(
    denoise: ToldDenoiser, states: list[Latent], sigma: float, sigma_next: float
) -> Callable[[float], list[Latent]]:
    """tau -> the states after one step of Euler."""
    return lambda tau: [_euler(denoise, x, sigma, sigma_next, tau) for x in states]


def _euler(denoise: ToldDenoiser, x: Latent, sigma: float, sigma_next: float, tau: float) -> Latent:
    level, sigma_cond = (torch.full((len(x),), value, dtype=x.dtype) for value in (sigma, tau))
    return x + (sigma_next - sigma) * (x - denoise(x, level, sigma_cond)) / sigma


def _coarse(score: dict[float, float]) -> list[float]:
    """Offsets of the log ratio beside 0: evenly from below, and one above."""
    low, high = (math.log(ratio) for ratio in RANGE)
    below = COARSE - 2
    return [*(low * (below - i) / below for i in range(below)), high]


def _bracket(score: dict[float, float]) -> list[float]:
    """Six more offsets around the best so far: three on either side, or all on the inner side of an end."""
    offsets = sorted(score)
    i = min(range(len(offsets)), key=lambda i: score[offsets[i]])
    sides = [offsets[j] for j in (i - 1, i + 1) if 0 <= j < len(offsets)]
    each = FINE // max(len(sides), 1)
    return [offsets[i] + (side - offsets[i]) * k / (each + 1) for side in sides for k in range(1, each + 1)]
