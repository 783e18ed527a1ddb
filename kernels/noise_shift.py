"""What to tell the network about the noise of a picture smaller than it was trained on (NoiseShift, He et al. 2025).

The same sigma destroys more of a small picture than of a large one. The schedule stays; the network is told a level
sigma_cond at which it denoises clean pictures of the size at hand best. Pictures x0 are noised to a level, every
candidate sees the same noise, and the sigma_cond wanted is where the loss E|denoised - x0|^2 is least: up to a factor
that no candidate changes, this is the error of eps, of v and of one step. The paper picks the candidate of least loss
level by level; where the loss is flat that is a lottery. The joint fit asks for one smooth curve through all levels,
and for proof on held-out pictures (`gate`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from .gate import FEWEST, Verdict, in_standard_errors, judge
from .space import NoiseSpace
from .timestep_aligner import ToldDenoiser
from .types import Latent, Sigma

WIDEST = 1.2  # offsets of ln(sigma / alpha) that are tried, either way
LOWEST, HIGHEST = -3.0, 3.0  # ln(sigma / alpha): beyond, a picture hardly changes what the best answer is
PENALTIES = (1e3, 10.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)  # of roughness, from one constant to almost none
FINEST = 0.008  # log units between the offsets that the joint fit can choose
EQUALLY_GOOD = 2.0  # standard errors within which a smoother curve counts as equally good
LEAST_LOSS = 0.01  # share of the loss that a shift must take away: most of a loss no shift can
FOLDS = 4  # of the pictures; each is judged by the curve of the others


@dataclass(frozen=True)
class ShiftPreset:
    """How many pictures, noise levels, candidates at each level, and noises put on a picture for each of these."""

    pictures: int
    levels: int
    offsets: int
    noises: int = 2

    @property
    def evaluations(self) -> int:
        """Calls of the network for one picture, without guidance."""
        return self.pictures * self.levels * self.offsets * self.noises


SHIFT_PRESETS = {"quick": ShiftPreset(8, 8, 7), "normal": ShiftPreset(32, 16, 7), "thorough": ShiftPreset(128, 16, 7)}


@dataclass(frozen=True)
class Limits:
    """The levels that the network knows."""

    lowest: float
    highest: float


@dataclass(frozen=True)
class Shift:
    """What to tell at ascending levels `sigma` [m], and the evidence.

    verdict: what the gate found in the losses, mean over levels, of pictures that the curve was not fitted on; if it
    did not let the curve pass, sigma_cond is sigma. penalty: of roughness. best: the least loss at each level over the
    loss at the true level, on all pictures.
    """

    sigma: tuple[float, ...]
    sigma_cond: tuple[float, ...]
    verdict: Verdict
    penalty: float
    best: tuple[float, ...]

    def offsets(self, space: NoiseSpace) -> tuple[float, ...]:
        """ln(sigma_cond / alpha_cond) - ln(sigma / alpha)."""
        low, high = (space.log_ratio(torch.tensor(s, dtype=torch.float64)) for s in (self.sigma, self.sigma_cond))
        return tuple((high - low).tolist())


def calibration_levels(count: int, space: NoiseSpace, limits: Limits) -> Tensor:
    """`count` levels, even in ln(sigma / alpha), ascending, float64; a little inside what the network knows."""
    ends = space.log_ratio(torch.tensor([limits.lowest, min(limits.highest, 1 - 1e-9)]).double())
    if space.kind == "ve":
        ends[1] = math.log(limits.highest)
    low, high = max(LOWEST, float(ends[0]) + 0.3), min(HIGHEST, float(ends[1]) - 0.3)
    return space.at_log_ratio(torch.linspace(low, high, count, dtype=torch.float64))


def fit_joint(
    denoise: ToldDenoiser, x0: Latent, preset: ShiftPreset, space: NoiseSpace, limits: Limits, seed: int = 0
) -> Generator[tuple[int, dict[float, float]], None, Shift]:
    """One smooth curve of offsets for all levels, kept only if it lowers the loss of held-out pictures; yields the
    evaluations so far, and of the levels that are done the offset with the least loss.

    With L_i(d) the mean loss at level i, told d log units more, the curve minimises
    sum_i L_i(d_i) / L_i(0) + mu sum_i (d_{i+1} - d_i)^2, exactly, over a fine grid on splines of the losses. Every
    picture is judged by the curve of the other folds. The largest mu that is not worse than the best by two standard
    errors is taken; its curve from all pictures stands if the gate lets the judged gain pass.
    """
    sigmas = calibration_levels(preset.levels, space, limits)
    tried = torch.linspace(-WIDEST, WIDEST, preset.offsets, dtype=torch.float64)
    search = Losses(denoise, x0, sigmas, space, limits, seed, preset.noises)
    losses = torch.empty(len(x0), len(sigmas), len(tried), dtype=torch.float64)
    least: dict[float, float] = {}
    for i in range(len(sigmas)):
        for j, offset in enumerate(tried.tolist()):
            losses[:, i, j] = search.losses(i, offset)
            yield search.evaluations, least
        least = {**least, float(sigmas[i]): float(tried[losses[:, i].mean(0).argmin()])}
    return joint_shift(losses, tried, sigmas, space, limits)


def joint_shift(losses: Tensor, tried: Tensor, sigmas: Tensor, space: NoiseSpace, limits: Limits) -> Shift:
    """The joint fit to losses [pictures levels offsets] measured at the offsets `tried`, evenly spaced around 0."""
    grid = torch.linspace(-WIDEST, WIDEST, round(2 * WIDEST / FINEST) + 1, dtype=torch.float64)
    fine = losses @ spline(tried, grid).T  # [pictures levels grid]
    fine = fine / fine[..., len(grid) // 2].mean(0)[:, None]  # L_i(0) = 1
    judged = {mu: _judged(fine, grid, mu) for mu in PENALTIES}  # mu -> [pictures]
    lowest = min(judged.values(), key=lambda one: float(one.mean()))
    mu = next(mu for mu in PENALTIES if in_standard_errors(judged[mu] - lowest) <= EQUALLY_GOOD)
    verdict = judge(fine[..., len(grid) // 2].mean(1), judged[mu], least=LEAST_LOSS)
    chosen = grid[smoothest(fine.mean(0), grid, mu)] if verdict.accepted else torch.zeros_like(sigmas)
    sigma_cond = cond_level(sigmas, chosen, space, limits) if verdict.accepted else sigmas
    best = fine.mean(0).min(1).values
    return Shift(tuple(sigmas.tolist()), tuple(sigma_cond.tolist()), verdict, mu, tuple(best.tolist()))


class Losses:
    """Losses of candidates at fixed levels; all at one level see the same noises, in pairs of opposite sign."""

    def __init__(
        self, denoise: ToldDenoiser, x0: Latent, sigmas: Tensor, space: NoiseSpace, limits: Limits, seed: int,
        noises: int = 1,
    ):  # fmt: skip
        if len(x0) < FEWEST:
            raise ValueError(f"A noise shift needs at least {FEWEST} pictures, but there are {len(x0)}.")
        self.denoise, self.x0, self.sigmas, self.space, self.limits = denoise, x0, sigmas, space, limits
        self.seed, self.noises, self.evaluations = seed, noises, 0
        self._level, self._noised = -1, [x0]

    def losses(self, i: int, offset: float) -> Tensor:
        """Mean squared error of every picture at level i, the network told `offset` log units more, [pictures]."""
        sigma = self.sigmas[i]
        sigma_cond = cond_level(sigma, torch.tensor(offset, dtype=torch.float64), self.space, self.limits)
        levels = [level.to(self.x0).expand(len(self.x0)) for level in (sigma, sigma_cond)]
        total = torch.zeros(len(self.x0), dtype=torch.float64)
        for x in self._at(i):
            total += (self.denoise(x, *levels) - self.x0).double().square().flatten(1).mean(1).cpu()
            self.evaluations += len(self.x0)
        return total / self.noises

    def _at(self, i: int) -> list[Latent]:
        if self._level != i:
            generator = torch.Generator().manual_seed((self.seed + 7919 * i) % 2**63)
            sigma, signal = self.sigmas[i].to(self.x0), self.space.alpha(self.sigmas[i].to(self.x0)) * self.x0
            noise, self._level, self._noised = torch.zeros_like(self.x0), i, []
            for k in range(self.noises):
                drawn = -noise if k % 2 else torch.randn(self.x0.shape, generator=generator, dtype=torch.float64)
                noise = drawn.to(self.x0)
                self._noised.append(signal + sigma * self.space.scale * noise)
        return self._noised


def cond_level(sigma: Sigma, offset: Tensor, space: NoiseSpace, limits: Limits) -> Sigma:
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


def _judged(fine: Tensor, grid: Tensor, mu: float) -> Tensor:
    """Each picture's loss along the curve of the folds that it is not in, mean over levels, [pictures]."""
    n, levels = len(fine), torch.arange(fine.shape[1])
    judged, fold = torch.empty(n, dtype=torch.float64), torch.arange(n) % min(FOLDS, n)
    for k in range(min(FOLDS, n)):
        curve = smoothest(fine[fold != k].mean(0), grid, mu)
        judged[fold == k] = fine[fold == k][:, levels, curve].mean(1)
    return judged
