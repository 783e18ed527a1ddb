"""Problems whose answers are known exactly."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


class Gaussian:
    """Clean latents ~ N(0, std^2), independently per element, seen through either noise convention."""

    def __init__(self, std: float, alpha):
        self.std, self.alpha = std, alpha  # alpha: sigma -> weight of the clean latent

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] for x = alpha x0 + sigma eps."""
        a = self.alpha(sigma)
        return a * self.std**2 * x / (a**2 * self.std**2 + sigma**2)


def euler(denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """The plainest probability-flow sampler, d = (x - denoised) / sigma."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def end_std(gaussian: Gaussian, sigmas: Tensor) -> float:
    """Standard deviation of Euler's output, exactly: the map is linear, so one unit of start is enough."""
    first = sigmas[0]
    start = torch.sqrt(gaussian.alpha(first) ** 2 * gaussian.std**2 + first**2)
    return float(euler(gaussian.denoise, start, sigmas))
