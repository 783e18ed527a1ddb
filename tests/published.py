"""Methods as published, kept for comparison only: what the pack does in their place is in kernels/."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pack.kernels.gate import judge
from pack.kernels.noise_shift import WIDEST, Limits, Losses, Shift, ShiftPreset, calibration_levels, cond_level
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import Alignment, ToldDenoiser, euler_step, search_tau
from pack.kernels.types import Denoiser, Latent, Sigmas

CANDIDATES = 11  # for each level of the bound, itself among them
TOP_OF_FLOW = 1000.0  # sigma / alpha that stands for the bound's upper end on flow, whose 1 has none


# --- NoiseShift (He et al. 2025), level by level ------------------------------------------------------------------------


def fit_per_level(
    denoise: ToldDenoiser, x0: Latent, preset: ShiftPreset, space: NoiseSpace, limits: Limits, seed: int = 0
) -> Generator[int, None, Shift]:
    """As published: at each level the candidate of least mean loss, coarsely over the whole range, then finely around
    the best; yields the evaluations so far. The same number of candidates as the joint fit; nothing is held out.
    """
    sigmas = calibration_levels(preset.levels, space, limits)
    search = Losses(denoise, x0, sigmas, space, limits, seed)
    coarse = torch.linspace(-WIDEST, WIDEST, preset.offsets // 4 * 2 + 1).tolist()
    spare = preset.offsets - len(coarse)
    step = 2 * WIDEST / (len(coarse) - 1)
    chosen, plain, least = [], [], []
    for i in range(len(sigmas)):
        means: dict[float, float] = {}
        for stage in (lambda _: coarse, lambda at: [at + step * k / (spare // 2 + 1) for k in _either_way(spare // 2)]):
            for offset in stage(min(means, key=means.__getitem__, default=0.0)):
                if abs(offset) <= WIDEST + 1e-9:
                    means[offset] = float(search.losses(i, offset).mean())
                    yield search.evaluations
        chosen.append(min(means, key=means.__getitem__))
        plain.append(means[min(means, key=abs)])
        least.append(means[chosen[-1]])
    sigma_cond = cond_level(sigmas, torch.tensor(chosen, dtype=torch.float64), space, limits)
    ratios = tuple(a / b for a, b in zip(least, plain, strict=True))
    of_levels = judge(torch.ones(len(ratios)), torch.tensor(ratios))
    return Shift(tuple(sigmas.tolist()), tuple(sigma_cond.tolist()), of_levels, math.nan, ratios)


def _either_way(n: int) -> Sequence[int]:
    """-n … -1, 1 … n."""
    return [k for k in range(-n, n + 1) if k]


# --- Timestep Aligner (Xia et al. 2023, arXiv 2310.09469) ---------------------------------------------------------------


def align_published(
    denoise: ToldDenoiser,
    sigmas: Sigmas,
    starts: Sequence[Latent],
    space: NoiseSpace,
    highest: float = math.inf,
    noised: Callable[[float], Sequence[Latent]] | None = None,
) -> Generator[int, None, Alignment]:
    """Fit tau by the loss of the paper, for comparison with `align`; yields the calls made so far.

    The loss of a step is E|eps(x, sigma) - eps(x_next(tau), sigma_next)|^2: that the noise which the network sees stays
    the same over the step. Sequential: x is what the aligned steps have made of `starts`. Parallel: x = noised(sigma),
    data noised anew for each step. The step to 0 keeps its true level, as in the paper. Searched as in `align`, where
    the paper descends along gradients: it is one number a step. Up to 31 calls for each step and latent.
    """
    states, calls, chosen, gains = list(starts), 0, [], []

    def eps(x: Latent, sigma: float) -> Latent:
        level = torch.full((len(x),), sigma, dtype=x.dtype)
        return (x - float(space.alpha(torch.tensor(sigma))) * denoise(x, level, level)) / sigma

    for sigma, sigma_next in pairwise(sigmas.tolist()):
        if sigma_next == 0:
            chosen.append(sigma)
            gains.append(0.0)
            continue
        states = list(noised(sigma)) if noised is not None else states
        wanted = [eps(x, sigma) for x in states]
        calls += len(states)

        def change(reached: list[Latent], wanted: list[Latent] = wanted, level: float = sigma_next) -> float:
            return sum(float((eps(x, level) - b).square().sum()) for x, b in zip(reached, wanted, strict=True))

        search = search_tau(euler_step(denoise, states, sigma, sigma_next), change, sigma, space, highest)
        while True:
            try:
                next(search)
            except StopIteration as end:
                tau, states, least, plain = end.value
                break
            calls += 2 * len(states)
            yield calls
        chosen.append(tau)
        gains.append(1 - least / plain if plain else 0.0)
    return Alignment(tuple(sigmas.tolist()[:-1]), tuple(chosen), tuple(gains))


# --- the bound of Align Your Steps (KLUB) -------------------------------------------------------------------------------


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
