"""Align Your Steps (Sabour, Fidler and Kreis 2024, arXiv 2404.14507): the closed form, the bound and its optimiser.

The bound (KLUB) adds up, over the intervals [a, b] of a schedule, the integral over t from a to b of
t^-3 E|D(x_t, t) - D(x_b, b)|^2, with x_t = x0 + t e and x_b = x_t + sqrt(b^2 - t^2) e'. It is a bound for stochastic
DDIM; at its minimum the true divergence can be several times that of the closed form. So its optimiser watches an
error on held-out noise and stops early, as the authors stopped theirs by FID.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import check_sigmas
from .space import NoiseSpace
from .types import Denoiser, Latent, Sigmas

CANDIDATES = 11  # for each level, itself among them


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


def klub_optimal_gaussian(steps: int, sigma_min: float, sigma_max: float, c: float = 1.0) -> Sigmas:
    """The minimum of the bound for data ~ N(0, c^2 I) on VE, float64 [steps+1]: w = t^2 / (t^2 + c^2) is geometric."""
    low, high = (sigma**2 / (sigma**2 + c**2) for sigma in (sigma_min, sigma_max))
    w = torch.exp(torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64))
    return c * (w / (1 - w)).sqrt()


def klub_gaussian(sigmas: Sigmas, c: float = 1.0) -> Tensor:
    """The bound for data ~ N(0, c^2) per dimension: half the sum of r - 1 - ln r, r the ratio of neighbouring w."""
    w = sigmas.double() ** 2 / (sigmas.double() ** 2 + c**2)
    r = w[:-1] / w[1:]
    return 0.5 * (r - 1 - r.log()).sum()


def klub_interval(denoise: Denoiser, x0: Latent, low: float, high: float, noise: KlubNoise, c: float = 0.5) -> float:
    """The integral of one interval, low < high, per latent, estimated from one t for each of the latents x0 [b ...].

    t has the density that makes the integrand constant on data ~ N(0, c^2) (lemma 3.3), in strata over the batch. The
    estimate is multiplied by the density's normaliser, which depends on the interval; algorithm 2 as printed leaves it
    out, and so cannot compare levels. denoise: on VE, x [b ...] and sigma [b].
    """
    share = lambda level: level**2 / (level**2 + c**2)
    w_high = share(high)
    mass = w_high / share(low) - 1 - math.log(w_high / share(low))  # times 1 / (2 c^4): the normaliser
    w = w_high / _exceeding(noise.place * mass)
    t = c * (w / (1 - w)).sqrt()  # [b]
    column = lambda level: level.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
    x_t = x0 + column(t) * noise.first
    x_high = x_t + column((high**2 - t**2).clamp(min=0).sqrt()) * noise.second
    gap = denoise(x_t, t.to(x0)) - denoise(x_high, torch.full_like(t, high).to(x0))
    weight = 1 / (t**2 + c**2) - 1 / (high**2 + c**2)
    squares = gap.square().flatten(1).sum(dim=1).double() / weight
    return float(squares.mean()) * mass / (2 * c**4)


@dataclass(frozen=True)
class KlubNoise:
    """The random numbers of one estimate, kept to compare levels: place [b] in (0, 1), first and second [b ...]."""

    place: Tensor
    first: Latent
    second: Latent

    @classmethod
    def draw(cls, x0: Latent, generator: torch.Generator) -> KlubNoise:
        b = len(x0)
        jitter = torch.rand(b, generator=generator, dtype=torch.float64).clamp(min=1e-9)
        first, second = torch.randn(2, *x0.shape, generator=generator, dtype=x0.dtype)
        return cls((torch.randperm(b, generator=generator) + jitter) / b, first, second)


@dataclass(frozen=True)
class Sweep:
    """After one sweep over all levels: the schedule, by how much ln(sigma) moved at most, its held-out error."""

    sigmas: Sigmas
    moved: float
    error: float


def minimise_klub(
    denoise: Denoiser,
    data: Latent,
    sigmas: Sigmas,
    generator: torch.Generator,
    held_out: Callable[[Sigmas], float] | None = None,
    sweeps: int = 6,
    free: list[int] | None = None,
) -> Generator[Sweep | None, None, Sigmas]:
    """Algorithm 1: level by level to the best of 11 around it, judged by the two intervals it bounds; VE only.

    `sigmas` are positive; both ends stay, so do levels not in `free` (indices). Each level's candidates share their
    random numbers. With `held_out`, an error to keep low, the answer is the sweep (or the start) with the least error
    and the search ends once that rises; without, the last sweep. 44 b evaluations for each level and sweep.
    """
    check_sigmas(sigmas)
    if sigmas[-1] <= 0:
        raise ValueError("The bound needs positive levels: append the final 0 afterwards.")
    levels = sigmas.double().tolist()
    best = sigmas.double()
    least = held_out(best) if held_out is not None else math.inf
    for _ in range(sweeps):
        before = list(levels)
        for i in free if free is not None else range(1, len(levels) - 1):
            noise = [KlubNoise.draw(data, generator) for _ in range(2)]
            levels[i] = min(
                _around(levels[i - 1], levels[i], levels[i + 1]),
                key=lambda level: klub_interval(denoise, data, level, levels[i - 1], noise[0])
                + klub_interval(denoise, data, levels[i + 1], level, noise[1]),
            )
            yield None
        moved = max(abs(math.log(a / b)) for a, b in zip(levels, before, strict=True))
        now = torch.tensor(levels, dtype=torch.float64)
        error = held_out(now) if held_out is not None else math.nan
        yield Sweep(now, moved, error)
        if held_out is None or error < least:
            best, least = now, error
        if moved == 0 or error > least:
            break
    return best


def ve_denoiser(denoise: Denoiser, space: NoiseSpace) -> Denoiser:
    """`denoise` as the bound needs it, on VE: on a flow model x / (1 - sigma) has the noise sigma / (1 - sigma)."""
    if space.kind == "ve":
        return denoise

    def through_flow(x: Latent, level: Tensor) -> Latent:
        alpha = 1 / (1 + level)
        return denoise(x * alpha.to(x).reshape(-1, *[1] * (x.ndim - 1)), (level * alpha).to(x))

    return through_flow


def subdivided(sigmas: Sigmas) -> tuple[Sigmas, list[int]]:
    """Twice the steps, with the geometric mean between neighbours, and where the new levels are: the others stay."""
    between = (sigmas[:-1] * sigmas[1:]).sqrt()
    both = torch.stack([sigmas[:-1], between], dim=1).flatten()
    return torch.cat([both, sigmas[-1:]]), list(range(1, 2 * len(between), 2))


def _around(above: float, level: float, below: float) -> list[float]:
    """The level and, on either side, five more evenly in the logarithm towards the neighbour."""
    steps = CANDIDATES // 2 + 1
    up = [level * (above / level) ** (k / steps) for k in range(1, steps)]
    down = [level * (below / level) ** (k / steps) for k in range(1, steps)]
    return [level, *up, *down]


def _exceeding(mass: Tensor) -> Tensor:
    """The r >= 1 with r - 1 - ln r = mass, by Newton's method in ln r from above."""
    s = torch.where(mass < 1, (2 * mass).sqrt(), 2 * torch.log1p(mass))
    for _ in range(40):
        slope = torch.expm1(s)
        s = s - torch.where(slope > 0, (slope - s - mass) / slope.clamp(min=1e-300), torch.zeros_like(s))
    return s.exp()
