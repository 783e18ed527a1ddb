"""Schedules as the makers of flow models run them: equal steps of time, moved towards noise by the picture's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .types import Sigma, Sigmas

TRAINED = 1000  # timesteps that a network was trained on
LCM_TIMESTEPS = 50  # of them, those that consistency models were distilled on
LOGIT_ENDS = (-7.5, 9.0)  # ln(sigma / (1 - sigma)): the ends of Ideogram's levels
SD_BETAS = (0.00085, 0.012)  # of Stable Diffusion, the squares of equal steps between their roots


def time_shift(u: Sigma, factor: float) -> Sigma:
    """The level of which u is the unshifted one: the noise over the signal is `factor` times as much, 0 and 1 stay.

    sigma = f u / (1 + (f - 1) u), Esser et al. 2024 (arXiv 2403.03206), with f = exp(mu) where makers state mu.
    """
    return factor * u / (1 + (factor - 1) * u)


def uniform(steps: int, factor: float) -> Sigmas:
    """`steps` equal steps from 1 to 0 under `time_shift`, float64 [steps+1]."""
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), factor)


def twice(steps: int, factor: float) -> Sigmas:
    """The same with its last positive level at the shifted first of 1000 timesteps, and the shift applied once more.

    How Stability AI and diffusers run models that give no steps of their own: float64 [steps+1].
    """
    least = float(time_shift(torch.tensor(1 / TRAINED, dtype=torch.float64), factor))
    equal = torch.linspace(1, least, steps, dtype=torch.float64)
    return torch.cat([time_shift(equal, factor), torch.zeros(1, dtype=torch.float64)])


def quadratic(steps: int, threshold: float) -> Sigmas:
    """Half of the steps equal, down to 1 - `threshold`, the rest quadratic, joined with one slope: float64 [steps+1].

    Movie Gen (Polyak et al. 2024, arXiv 2410.13720, section 3.4.2) as Genmo runs it.
    """
    linear = steps // 2
    if linear == 0:
        return torch.tensor([1.0, 0.0], dtype=torch.float64)
    rest = steps - linear
    i = torch.arange(steps + 1, dtype=torch.float64)
    bend = (linear - threshold * steps) / (linear * rest**2)
    slope = threshold / linear - 2 * bend * linear
    done = torch.where(i < linear, i * threshold / linear, bend * i**2 + slope * i + bend * linear**2)
    return torch.cat([1 - done[:-1], torch.zeros(1, dtype=torch.float64)])


def logit_normal(steps: int, factor: float, spread: float) -> Sigmas:
    """Quantiles of a normal distribution of ln(sigma / (1 - sigma)), of that spread around ln(factor), at equal shares.

    How Ideogram runs its model, with the end levels at half log-SNRs of -9 and 7.5 before the 0: float64 [steps+1].
    """
    share = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ratio = math.log(factor) + spread * torch.special.ndtri(share)
    levels = ratio.clamp(*LOGIT_ENDS).sigmoid()
    return torch.cat([levels[:-1], torch.zeros(1, dtype=torch.float64)])


def equal_odds(steps: int, low: float, high: float) -> Sigmas:
    """Equal steps of ln((1 - sigma) / sigma) from `low` to `high`, its ends moved to 1 and 0: float64 [steps+1].

    How Stability AI runs Stable Audio 3, where the quantity is called log-SNR.
    """
    levels = (-torch.linspace(low, high, steps + 1, dtype=torch.float64)).sigmoid()
    levels[0], levels[-1] = 1, 0
    return levels


def karras(steps: int, high: float, low: float, rho: float) -> Sigmas:
    """`steps` levels from `high` to `low` whose rho-th roots are equally far apart, then 0: float64 [steps+1].

    Karras et al. 2022 (arXiv 2206.00364), equation 5; one step starts at `high`.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def stretch(sigmas: Sigmas, terminal: float) -> Sigmas:
    """`sigmas` with the part without noise of its positive levels stretched so that the last of them is `terminal`.

    1 - s' = (1 - s)(1 - terminal)/(1 - last). A run of one step has no level to move.
    """
    clean = 1 - sigmas[:-1]
    if len(clean) < 2:
        return sigmas
    return torch.cat([1 - clean * (1 - terminal) / clean[-1], sigmas[-1:]])


def linear_mu(tokens: int, at: Sequence[int], mu: Sequence[float]) -> float:
    """mu on the line through mu[0] at at[0] tokens and mu[1] at at[1], also beyond them."""
    return mu[0] + (mu[1] - mu[0]) * (tokens - at[0]) / (at[1] - at[0])


def trailing_timesteps(steps: int) -> list[int]:
    """`steps` of the trained timesteps, evenly from the last one (Lin et al. 2024, arXiv 2305.08891)."""
    return [round(TRAINED * (steps - i) / steps) - 1 for i in range(steps)]


def lcm_timesteps(steps: int) -> list[int]:
    """`steps` of the 50 timesteps that latent consistency models were distilled on, the noisiest first."""
    kept = [TRAINED // LCM_TIMESTEPS * (i + 1) - 1 for i in range(LCM_TIMESTEPS)][::-1]
    return [kept[math.floor(i * LCM_TIMESTEPS / steps)] for i in range(min(steps, LCM_TIMESTEPS))]


def sd_sigmas(timesteps: Sequence[int]) -> Sigmas:
    """The noise levels of Stable Diffusion's trained timesteps, with the 0 at the end: float64 [n+1]."""
    low, high = (math.sqrt(beta) for beta in SD_BETAS)
    alpha_bar = (1 - torch.linspace(low, high, TRAINED, dtype=torch.float64) ** 2).cumprod(0)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()[list(timesteps)]
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def dimension_factor(dimensions: int, base: int) -> float:
    """The shift for latents of so many numbers beside that of `base`: the square root of their ratio.

    Diffusion Transformers with Representation Autoencoders (Zheng et al. 2025, arXiv 2510.11690), section 4.2.
    """
    return math.sqrt(dimensions / base)
