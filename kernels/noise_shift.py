"""What to tell the network about the noise of a picture smaller than it was trained on (NoiseShift, He et al. 2025).

The same sigma destroys more of a small picture than of a large one. The schedule stays; the network is told a level
sigma_hat at which it denoises clean pictures of the size at hand best. Pictures x0 are noised to a level, every
candidate sees the same noise, and the sigma_hat wanted is where the loss E|denoised - x0|^2 is least: up to a factor
that no candidate changes, this is the error of eps, of v and of one step. The paper picks the candidate of least loss
level by level; where the loss is flat that is a lottery. The joint fit asks for one smooth curve through all levels,
and for proof on held-out pictures.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .space import NoiseSpace
from .timestep_aligner import ToldDenoiser
from .types import Latent, Sigma

WIDEST = 1.2  # offsets of ln(sigma / alpha) that are tried, either way
LOWEST, HIGHEST = -3.0, 3.0  # ln(sigma / alpha): beyond, a picture hardly changes what the best answer is
PENALTIES = (1e3, 10.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)  # of roughness, from one constant to almost none
FINEST = 0.004  # log units between the offsets that the joint fit can choose
SAME = 2.0  # standard errors within which a smoother curve counts as equally good
PROOF = 3.0  # standard deviations of a normal that the held-out gain must be away from none
LEAST_GAIN = 0.01  # of the loss; less is real perhaps, but not worth another network input
FEWEST = 4  # pictures: two to fit on, two to hold out


@dataclass(frozen=True)
class Preset:
    """How many pictures, noise levels and candidates at each level."""

    pictures: int
    levels: int
    offsets: int

    @property
    def evaluations(self) -> int:
        """Calls of the network for one picture, without guidance."""
        return self.pictures * self.levels * self.offsets


PRESETS = {"quick": Preset(8, 8, 13), "normal": Preset(32, 16, 13), "thorough": Preset(128, 16, 13)}


@dataclass(frozen=True)
class Limits:
    """The levels that the network knows."""

    lowest: float
    highest: float


@dataclass(frozen=True)
class Shift:
    """What to tell at ascending levels `sigma` [m], and the evidence.

    gain: by which share the loss falls, mean over levels, on pictures that the curve was not fitted on; of the search
    level by level on those it was fitted on. t: that change in its standard errors, nan if nothing was held out.
    needed: the t below which it counts. accepted: whether it did; if not, sigma_hat is sigma. penalty: of roughness,
    nan without. best: the least loss at each level over the loss at the true level, on all pictures.
    """

    sigma: tuple[float, ...]
    sigma_hat: tuple[float, ...]
    gain: float
    t: float
    needed: float
    accepted: bool
    penalty: float
    best: tuple[float, ...]

    def offsets(self, space: NoiseSpace) -> tuple[float, ...]:
        """ln(sigma_hat / alpha_hat) - ln(sigma / alpha)."""
        low, high = (space.log_ratio(torch.tensor(s, dtype=torch.float64)) for s in (self.sigma, self.sigma_hat))
        return tuple((high - low).tolist())


def calibration_levels(count: int, space: NoiseSpace, limits: Limits) -> Tensor:
    """`count` levels, even in ln(sigma / alpha), ascending, float64; a little inside what the network knows."""
    ends = space.log_ratio(torch.tensor([limits.lowest, min(limits.highest, 1 - 1e-9)]).double())
    if space.kind == "ve":
        ends[1] = math.log(limits.highest)
    low, high = max(LOWEST, float(ends[0]) + 0.3), min(HIGHEST, float(ends[1]) - 0.3)
    return space.at_log_ratio(torch.linspace(low, high, count, dtype=torch.float64))


def fit_joint(
    denoise: ToldDenoiser, x0: Latent, preset: Preset, space: NoiseSpace, limits: Limits, seed: int = 0
) -> Generator[int, None, Shift]:
    """One smooth curve of offsets for all levels, kept only if it lowers the loss of held-out pictures; yields the
    evaluations so far.

    With L_i(d) the mean loss at level i, told d log units more, the curve minimises
    sum_i L_i(d_i) / L_i(0) + mu sum_i (d_{i+1} - d_i)^2, exactly, over a fine grid on splines of the losses. Each half
    of the pictures is judged by the curve of the other half. The largest mu that is not worse than the best by two
    standard errors is taken; its curve from all pictures stands if the judged gain is beyond chance and at least 1 %.
    """
    sigmas = calibration_levels(preset.levels, space, limits)
    tried = torch.linspace(-WIDEST, WIDEST, preset.offsets, dtype=torch.float64)
    search = _Search(denoise, x0, sigmas, space, limits, seed)
    losses = torch.empty(len(x0), len(sigmas), len(tried), dtype=torch.float64)
    for i in range(len(sigmas)):
        for j, offset in enumerate(tried.tolist()):
            losses[:, i, j] = search.losses(i, offset)
            yield search.evaluations
    return joint_shift(losses, tried, sigmas, space, limits)


def joint_shift(losses: Tensor, tried: Tensor, sigmas: Tensor, space: NoiseSpace, limits: Limits) -> Shift:
    """The joint fit to losses [pictures levels offsets] measured at the offsets `tried`, evenly spaced around 0."""
    grid = torch.linspace(-WIDEST, WIDEST, round(2 * WIDEST / FINEST) + 1, dtype=torch.float64)
    fine = losses @ spline(tried, grid).T  # [pictures levels grid]
    fine = fine / fine[..., len(grid) // 2].mean(0)[:, None]  # L_i(0) = 1
    halves = (torch.arange(len(fine)) % 2).bool()
    curves = {
        mu: (smoothest(fine[~halves].mean(0), grid, mu), smoothest(fine[halves].mean(0), grid, mu)) for mu in PENALTIES
    }
    judged = {mu: _judged(fine, halves, *pair) for mu, pair in curves.items()}  # mu -> [pictures]
    best = min(judged.values(), key=lambda one: float(one.mean()))
    mu = next(mu for mu in PENALTIES if _mean_over_error(judged[mu] - best) <= SAME)
    change = judged[mu] - fine[..., len(grid) // 2].mean(1)
    t, needed = _mean_over_error(change), -students_t(PROOF, len(fine) - 1)
    gain = -float(change.mean())
    accepted = t < needed and gain >= LEAST_GAIN
    chosen = grid[smoothest(fine.mean(0), grid, mu)] if accepted else torch.zeros(len(sigmas), dtype=torch.float64)
    told = _told(sigmas, chosen, space, limits) if accepted else sigmas
    return Shift(
        tuple(sigmas.tolist()), tuple(told.tolist()), gain, t, needed, accepted, mu,
        tuple(fine.mean(0).min(1).values.tolist()),
    )  # fmt: skip


def fit_per_level(
    denoise: ToldDenoiser, x0: Latent, preset: Preset, space: NoiseSpace, limits: Limits, seed: int = 0
) -> Generator[int, None, Shift]:
    """As published: at each level the candidate of least mean loss, coarsely over the whole range, then finely around
    the best; yields the evaluations so far. The same number of candidates as the joint fit; nothing is held out.
    """
    sigmas = calibration_levels(preset.levels, space, limits)
    search = _Search(denoise, x0, sigmas, space, limits, seed)
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
    told = _told(sigmas, torch.tensor(chosen, dtype=torch.float64), space, limits)
    ratios = [a / b for a, b in zip(least, plain, strict=True)]
    gain = 1 - sum(ratios) / len(ratios)
    return Shift(tuple(sigmas.tolist()), tuple(told.tolist()), gain, math.nan, math.nan, True, math.nan, tuple(ratios))


FITS = {"joint": fit_joint, "per level": fit_per_level}


class _Search:
    """Losses of candidates at fixed levels; all candidates at a level see the same noise."""

    def __init__(self, denoise: ToldDenoiser, x0: Latent, sigmas: Tensor, space: NoiseSpace, limits: Limits, seed: int):
        if len(x0) < FEWEST:
            raise ValueError(f"A noise shift needs at least {FEWEST} pictures, but there are {len(x0)}.")
        self.denoise, self.x0, self.sigmas, self.space, self.limits = denoise, x0, sigmas, space, limits
        self.seed, self.evaluations, self._noised = seed, 0, (-1, x0)

    def losses(self, i: int, offset: float) -> Tensor:
        """Mean squared error of every picture at level i, the network told `offset` log units more, [pictures]."""
        sigma = self.sigmas[i]
        told = _told(sigma, torch.tensor(offset, dtype=torch.float64), self.space, self.limits)
        denoised = self.denoise(self._at(i), *(level.to(self.x0).expand(len(self.x0)) for level in (sigma, told)))
        self.evaluations += len(self.x0)
        return (denoised - self.x0).double().square().flatten(1).mean(1).cpu()

    def _at(self, i: int) -> Latent:
        if self._noised[0] != i:
            generator = torch.Generator().manual_seed((self.seed + 7919 * i) % 2**63)
            noise = torch.randn(self.x0.shape, generator=generator, dtype=torch.float64).to(self.x0)
            sigma = self.sigmas[i].to(self.x0)
            self._noised = (i, self.space.alpha(sigma) * self.x0 + sigma * noise)
        return self._noised[1]


def _told(sigma: Sigma, offset: Tensor, space: NoiseSpace, limits: Limits) -> Sigma:
    """sigma moved by `offset` in ln(sigma / alpha), inside what the network knows."""
    return space.at_log_ratio(space.log_ratio(sigma) + offset).clamp(limits.lowest, limits.highest)


def smoothest(losses: Tensor, grid: Tensor, mu: float) -> Tensor:
    """Indices into `grid` [m] that minimise sum_i losses[i, g_i] + mu sum_i (grid[g_{i+1}] - grid[g_i])^2, exactly."""
    rough = mu * (grid[:, None] - grid[None]).square()  # [to from]
    cost, came = losses[0], []
    for row in losses[1:]:
        least, index = (rough + cost[None]).min(1)
        came.append(index)
        cost = least + row
    path = [int(cost.argmin())]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    return torch.tensor(path[::-1])


def spline(knots: Tensor, at: Tensor) -> Tensor:
    """[len(at) len(knots)]: times the values at even `knots`, the cubic spline through them at `at`.

    Not-a-knot ends, so cubics come back exactly.
    """
    n, h = len(knots), float(knots[1] - knots[0])
    left, right = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for row in range(1, n - 1):
        left[row, row - 1 : row + 2] = torch.tensor([1.0, 4.0, 1.0])
        right[row, row - 1 : row + 2] = torch.tensor([1.0, -2.0, 1.0]) * 6 / h**2
    left[0, :3], left[-1, -3:] = torch.tensor([1.0, -2.0, 1.0]), torch.tensor([1.0, -2.0, 1.0])
    curvature = torch.linalg.solve(left, right)
    i = ((at - knots[0]) / h).floor().long().clamp(0, n - 2)
    b = ((at - knots[i]) / h)[:, None]
    a, values = 1 - b, torch.eye(n, dtype=torch.float64)
    bend = (a**3 - a) * curvature[i] + (b**3 - b) * curvature[i + 1]
    return a * values[i] + b * values[i + 1] + bend * h**2 / 6


def _judged(fine: Tensor, halves: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Each picture's loss along the curve of the half that it is not in, mean over levels, [pictures]."""
    levels = torch.arange(fine.shape[1])
    return torch.where(halves, fine[:, levels, one].mean(1), fine[:, levels, other].mean(1))


def _mean_over_error(change: Tensor) -> float:
    """The mean in units of its standard error; 0 where nothing changes."""
    error = float(change.std() / math.sqrt(len(change)))
    return float(change.mean()) / error if error else 0.0


def students_t(z: float, freedom: int) -> float:
    """The value that Student's t exceeds as rarely as a normal exceeds z (Abramowitz and Stegun 26.7.5)."""
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3 + g4 / freedom**4


def _either_way(n: int) -> Sequence[int]:
    """-n … -1, 1 … n."""
    return [k for k in range(-n, n + 1) if k]
