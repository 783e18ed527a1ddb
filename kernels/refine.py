"""Runs that start from a degraded picture instead of noise: where they start, and what detail that keeps.

All is said in the ratio r = sigma * scale / alpha of the noise's size to the signal's, which means the same corruption
in both noise spaces (r = sigma for SD and SDXL, sigma / (1 - sigma) for flow models).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .space import NoiseSpace
from .types import Sigmas

RHO = 7.0  # of Karras et al. 2022 (arXiv 2206.00364), for the way down from a start
EDGE = 0.564604  # tan(theta) of cos^4 - 4 cos^3 + 8 cos^2 = 4: noise over signal at the edge of what a picture lost


def crossing(space: NoiseSpace) -> float:
    """The ratio at which Resfusion starts (Shi et al. 2024, NeurIPS, arXiv 2311.14900): the clean picture cancels.

    x_t = sqrt(a) x0 + (1 - sqrt(a)) (y - x0) + sqrt(1 - a) eps for a degraded y; at sqrt(a) = 1/2 the terms of x0
    cancel, and y and noise are left: r = sqrt(3) for SD and SDXL. The same with a flow's weights: alpha = 1/2, r = 1.
    """
    return math.sqrt(3.0) if space.kind == "ve" else 1.0


def resfusion(steps: int, space: NoiseSpace, lowest: float) -> Tensor:
    """Ratios [steps+1] from the crossing to `lowest` along Karras' curve, then 0; the paper has its training levels."""
    return down_from(crossing(space), steps, lowest)


def down_from(highest: float, steps: int, lowest: float) -> Tensor:
    """Ratios [steps+1] from `highest` to `lowest` along Karras' curve, then 0."""
    low, high = min(lowest, 0.5 * highest) ** (1 / RHO), highest ** (1 / RHO)
    return _then_zero(torch.linspace(high, low, steps, dtype=torch.float64) ** RHO)


def resshift(steps: int, kappa: float = 2.0, p: float = 0.3, smallest: float | None = None) -> Tensor:
    """Ratios [steps+1] of ResShift (Yue et al. 2023, arXiv 2307.12348), then 0; published for 15 and 4 steps.

    sqrt(eta_t) = s1 b^(((t-1)/(T-1))^p (T-1)), s1 = min(smallest / kappa, smallest), b = (0.99 / s1)^(1/(T-1)); r is
    kappa sqrt(eta). smallest: .04 for 15 steps, .2 for 4, as published; in between it follows the number of steps.
    """
    if smallest is None:
        smallest = 0.2 * (0.04 / 0.2) ** min(max((steps - 4) / 11, 0), 1)
    first = min(smallest / kappa, smallest)
    share = torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)
    return _then_zero(kappa * first * (0.99 / first) ** (share**p))


def hir_diff(steps: int, highest: float, k: float = 8.0) -> Tensor:
    """Ratios [steps+1] of HIR-Diff (Pang et al. 2024, arXiv 2402.15865): one giant step, then fine ones; the last is 0.

    a_j = 1 - exp(-k j / n), scaled to [1e-3, 1], is alpha_bar; r = sqrt((1 - a) / a), not above the model's `highest`.
    """
    a = 1 - torch.exp(-k * torch.arange(steps + 1, dtype=torch.float64) / steps)
    a = 1e-3 + (1 - 1e-3) * a / a[-1]
    return ((1 - a).clamp(min=0) / a).sqrt().clamp(max=highest)


def _then_zero(ratios: Tensor) -> Tensor:
    return torch.cat([ratios, torch.zeros(1, dtype=ratios.dtype)])


def at_ratio(space: NoiseSpace, ratios: Tensor) -> Sigmas:
    """The levels of these ratios."""
    return space.at_log_ratio(ratios.log())


def ratio(space: NoiseSpace, sigmas: Sigmas) -> Tensor:
    """The noise's size over the signal's at these levels; inf at a flow's 1."""
    return space.log_ratio(sigmas).exp()


def power_per_mode(side: int) -> float:
    """c of the power c / f^2 that a square latent of `side`, unit variance and 1/f amplitude has at f cycles a side.

    The mean of c / f^2 over all frequencies but the mean colour is 1; white noise of unit variance has power 1 at each.
    """
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    squared = (f[:, None] ** 2 + f[None] ** 2).flatten()[1:]
    return (side * side - 1) / float((1 / squared).sum())


def signal_to_noise(r: float, side: int) -> Callable[[float], float]:
    """Cycles a side -> power of a picture over that of noise of ratio r, for a latent of `side`, 1/f amplitude."""
    c = power_per_mode(side)
    return lambda f: c / (f * r) ** 2


def kept_up_to(r: float, side: int) -> float:
    """Cycles a side up to which such a picture is stronger than noise of ratio r: coarser detail is kept."""
    return math.sqrt(power_per_mode(side)) / r


def start_for_detail(finest: float, side: int) -> float:
    """The ratio from which a picture that lost all detail finer than `finest` latent pixels is best drawn on.

    For Gaussian pictures of 1/f amplitude and the exact probability flow. At a frequency of power P, with tan(theta) =
    r / sqrt(P), a run from r moves what the picture kept by 2 (1 - cos theta) P in the mean square, and what it draws
    for what was lost has a squared 2-Wasserstein distance of (1 - sin theta)^2 P from what belongs there. Over all
    frequencies the sum is least where both are the same at the edge, half a cycle to `finest` pixels.
    """
    return EDGE * kept_up_to(side / (2 * finest), side)
