"""Align Your Steps (Sabour, Fidler and Kreis 2024, arXiv 2404.14507): the closed form of its optimal schedule.

The bound that the paper minimises in place of the divergence, and its optimiser, are comparison methods
(tests/published.py): at its minimum the true divergence can be several times that of the closed form.
"""

from __future__ import annotations

import math

import torch

from .space import NoiseSpace
from .types import Sigmas


def kl_optimal(steps: int, sigma_max: float, space: NoiseSpace, c: float = 1.0) -> Sigmas:
    """The Euler schedule from `sigma_max` to 0 with the least KL divergence for data ~ N(0, c^2 I), [steps+1].

    Theorem 3.1: the angle atan(sigma / c) falls in equal steps. One step multiplies the standard deviation by the
    cosine of its change of angle, and log cos is concave, so equal steps are optimal. On a flow model the same holds
    for sigma / (1 - sigma). Float64; the first level is `sigma_max` itself and the last is 0.
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step, but steps = {steps}.")
    if not (math.isfinite(sigma_max) and sigma_max > 0 and c > 0):
        raise ValueError(f"sigma_max and c must be positive numbers, but sigma_max = {sigma_max:.4g} and c = {c:.4g}.")
    first = torch.tensor(sigma_max, dtype=torch.float64)
    share = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = space.at_angle(space.angle(first, c) * share, c)
    return torch.cat([first[None], sigmas[1:-1], torch.zeros(1, dtype=torch.float64)])
