"""Problems whose answers are known exactly."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pack.kernels.analytic import Gaussian
from pack.kernels.space import NoiseSpace


def gaussian(std: float, space: NoiseSpace) -> Gaussian:
    """Clean latents ~ N(0, std^2), one element, float64."""
    return Gaussian(torch.zeros(1, dtype=torch.float64), torch.tensor([std], dtype=torch.float64), space)


def euler(denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """The plainest probability-flow sampler, d = (x - denoised) / sigma."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def end_std(target: Gaussian, sigmas: Tensor) -> float:
    """Standard deviation of Euler's output, exactly: the map is linear, so one unit of start is enough."""
    first = sigmas[0]
    start = torch.sqrt(target.space.alpha(first) ** 2 * target.std**2 + first**2)
    return float(euler(target.denoise, start, sigmas))
