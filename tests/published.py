"""Methods as published, kept for comparison only: what the pack does in their place is in kernels/."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from pack.kernels.gate import judge
from pack.kernels.noise_shift import WIDEST, Limits, Losses, Shift, ShiftPreset, calibration_levels, cond_level
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import Alignment, ToldDenoiser, Trajectory, euler_step, search_tau
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


# --- OLSS (Duan et al. 2023, arXiv 2305.14677) --------------------------------------------------------------------------


@dataclass(frozen=True)
class OlssRun:
    """Levels [n+1], and for step i the weights of the start and of the i + 1 answers so far, the first one first."""

    sigmas: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]


def fit_olss(denoise: Denoiser, sigmas: Sigmas, path: Trajectory) -> OlssRun:
    """For each step the weights that bring it nearest to `path`, by plain least squares, on states that these make."""
    start = x = path.states[0]
    answers: list[Latent] = []
    weights: list[tuple[float, ...]] = []
    for sigma, sigma_next in pairwise(sigmas.double()):
        answers.append(denoise(x, sigma))
        columns = torch.stack([start, *answers]).flatten(1).double()
        found = torch.linalg.lstsq(columns.T, path.at(float(sigma_next)).flatten().double()[:, None]).solution
        weights.append(tuple(found[:, 0].tolist()))
        x = _weighed(weights[-1], [start, *answers])
    return OlssRun(tuple(sigmas.tolist()), tuple(weights))


def solve_olss(denoise: Denoiser, x: Latent, run: OlssRun) -> Latent:
    seen = [x]
    for sigma, weights in zip(run.sigmas, run.weights, strict=False):
        seen.append(denoise(x, torch.tensor(sigma, dtype=torch.float64)))
        x = _weighed(weights, seen)
    return x


def _weighed(weights: Sequence[float], latents: Sequence[Latent]) -> Latent:
    out = latents[0] * weights[0]
    for weight, one in zip(weights[1:], latents[1:], strict=True):
        out.add_(one, alpha=weight)
    return out


# --- a unified solver and the search for its plan (Liu et al. 2023, arXiv 2312.07243) -----------------------------------

ORDERS, OF, ESTIMATES = (1, 2, 3), ("data", "noise"), ("all", "few", "middle")
PARENTS = 4  # the best plans so far, of which one is changed


@dataclass(frozen=True)
class PlanStep:
    """How one step goes on: the degree of its polynomial through the last answers plus 1, what that polynomial is of,
    and how it is found: every derivative from all answers, each from as few as it needs, or its value in the middle
    for its integral, as DPM-Solver++(2M) has it."""

    order: int = 2
    of: str = "data"
    estimate: str = "middle"


Plan: TypeAlias = tuple[int, tuple[PlanStep, ...]]  # which of some schedules, and its steps


def solve_plan(denoise: Denoiser, x: Latent, sigmas: Sigmas, steps: Sequence[PlanStep], space: NoiseSpace) -> Latent:
    """A multistep exponential integrator in ln(alpha / sigma) whose kind is chosen for every step."""
    known: list[tuple[float, Latent, Latent]] = []  # where, data, noise; the newest first
    for step, (sigma, sigma_next) in zip(steps, pairwise(sigmas.double()), strict=True):
        data, alpha, alpha_next = denoise(x, sigma), float(space.alpha(sigma)), float(space.alpha(sigma_next))
        ratio = float(sigma_next / sigma)
        if ratio == 0 or alpha == 0:  # the end, or nothing but noise: one answer alone
            x = torch.lerp(data, x, ratio)
            continue
        known = [(-float(space.log_ratio(sigma)), data, (x - alpha * data) / float(sigma)), *known][: max(ORDERS)]
        used = known[: step.order]
        weights = plan_weights([at - used[0][0] for at, *_ in used], math.log(alpha_next / alpha / ratio), step)
        if step.of == "data":
            x = ratio * x + alpha_next * _weighed(weights, [data for _, data, _ in used])
        else:
            x = alpha_next / alpha * x - float(sigma_next) * _weighed(weights, [noise for *_, noise in used])
    return x


def plan_weights(places: Sequence[float], h: float, step: PlanStep) -> list[float]:
    """Of the answers at `places` (0 first) in the integral over (0, h) of their polynomial with the weight e^(s - h), or
    e^(h - s) for noise."""
    n = len(places)
    moments = [-math.expm1(-h) if step.of == "data" else math.expm1(h)]
    for k in range(1, n):
        moments.append(h**k - k * moments[-1] if step.of == "data" else k * moments[-1] - h**k)
    if step.estimate == "middle":
        moments = [moments[0] * (h / 2) ** k for k in range(n)]
    powers = torch.tensor(places, dtype=torch.float64)[:, None] ** torch.arange(n)
    of_answers = torch.linalg.inv(powers)  # [n n]: the polynomial's coefficients from the answers
    if step.estimate == "few":
        for degree in range(1, n - 1):  # each coefficient from the first degree + 1 answers alone
            of_answers[degree] = 0
            of_answers[degree, : degree + 1] = torch.linalg.inv(powers[: degree + 1, : degree + 1])[degree]
    return (torch.tensor(moments, dtype=torch.float64) @ of_answers).tolist()


def search_plan(
    error: Callable[[Plan], float], steps: int, schedules: int, trials: int, generator: torch.Generator
) -> Plan:
    """The plan of least error after `trials` of them: 2M on each of the schedules, then changes of the best few."""
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))
    chance = lambda share: float(torch.rand(1, generator=generator)) < share
    tried: dict[Plan, float] = {}
    while len(tried) < trials:
        if len(tried) < schedules:
            plan: Plan = (len(tried), (PlanStep(),) * steps)
        else:
            at, kinds = sorted(tried, key=lambda one: tried[one])[pick(min(PARENTS, len(tried)))]
            anew = lambda: PlanStep(ORDERS[pick(len(ORDERS))], OF[pick(len(OF))], ESTIMATES[pick(len(ESTIMATES))])
            changed = pick(steps)
            kinds = tuple(anew() if i == changed or chance(1 / steps) else one for i, one in enumerate(kinds))
            plan = (pick(schedules) if chance(0.2) else at, kinds)
        if plan not in tried:
            found = error(plan)
            tried[plan] = found if math.isfinite(found) else math.inf
    return min(tried, key=lambda one: tried[one])


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
