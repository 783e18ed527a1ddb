"""Which noise a trainer sees: how often each noise level is drawn, and which draw of noise goes with which picture.

A trainer that draws uniform timesteps and compares clean pictures weights each level of that error alike. To draw the
levels with a density w(t) instead weights it by w(t), without touching the loss. t is the time that the network is
told, 1 for pure noise; the model's levels stand at the middles of n equal parts of it, the noisiest first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .space import NoiseSpace
from .types import Latent, Sigmas

Density = Literal["stock", "logit-normal", "mode", "flat prediction", "min-SNR", "clusters", "curriculum"]
LOWEST_GAIN = 0.05  # below it, 1 / gain^2 would leave the rest of the levels without a draw
STEEPEST_MODE = 2 / (math.pi - 2)  # the largest scale at which the mode density's quantile still rises
WHOLE_RANGE = 0.5  # of the planned draws: from here on a curriculum draws from all levels


@dataclass(frozen=True)
class Levels:
    """The noise levels that a trainer can draw, falling, [n] each.

    gain: what an error of the network's own prediction becomes in the clean picture: sigma where it predicts noise or
    a flow's velocity.
    """

    sigma: Sigmas
    gain: Tensor
    space: NoiseSpace

    @property
    def time(self) -> Tensor:
        """The middles of n equal parts of the training time, from 1 down to 0."""
        n = len(self.sigma)
        return 1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n

    @property
    def half_log_snr(self) -> Tensor:
        return -self.space.log_ratio(self.sigma.double())


@dataclass(frozen=True)
class TimestepDensity:
    """Which levels are drawn how often.

    mean, spread: of logit(t), for "logit-normal"; scale: of "mode"; gamma: of "min-SNR"; clusters: how many, for
    "clusters" and "curriculum"; planned: draws of the whole training, for "curriculum"; highest, lowest: sigmas beyond
    which nothing is drawn, 0 for the model's own.
    """

    kind: Density = "stock"
    mean: float = 0.0
    spread: float = 1.0
    scale: float = 1.29
    gamma: float = 5.0
    clusters: int = 5
    planned: int = 0
    highest: float = 0.0
    lowest: float = 0.0

    @property
    def is_stock(self) -> bool:
        return self.kind == "stock" and not self.highest and not self.lowest


def stages(density: TimestepDensity, levels: Levels) -> list[Tensor]:
    """The share of draws of each level, [n] that sum to 1: one stage, or those of a curriculum in turn.

    ValueError where no level lies between `lowest` and `highest`.
    """
    sigma = levels.sigma.double()
    inside = (sigma >= density.lowest) & (sigma <= (density.highest or math.inf))
    if not inside.any():
        raise ValueError(
            f"No noise level of this MODEL lies between {density.lowest:g} and {density.highest:g}: its levels go from "
            f"{float(sigma[-1]):.3g} to {float(sigma[0]):.3g}."
        )
    return [shares * inside / (shares * inside).sum() for shares in _stages(density, levels, inside)]


def _stages(density: TimestepDensity, levels: Levels, inside: Tensor) -> list[Tensor]:
    one = torch.ones_like(levels.time)
    if density.kind in ("clusters", "curriculum"):
        within = inside.nonzero().flatten()
        count = min(density.clusters, len(within))
        ends = [int(within[0]) + end for end in cluster_ends(levels.half_log_snr[within], count)]
        starts = [int(within[0]), *ends[:-1]]
        if density.kind == "curriculum":
            return [one * (torch.arange(len(one)) < end) for end in ends]
        shares = torch.zeros_like(one)
        for start, end in zip(starts, ends, strict=True):
            shares[start:end] = 1 / (end - start)
        return [shares]
    weights = {
        "stock": lambda: one,
        "logit-normal": lambda: logit_normal_density(levels.time, density.mean, density.spread),
        "mode": lambda: mode_shares(len(one), density.scale),
        "flat prediction": lambda: levels.gain.double().clamp(min=LOWEST_GAIN) ** -2,
        "min-SNR": lambda: (2 * levels.half_log_snr).exp().clamp(max=density.gamma),
    }
    return [weights[density.kind]()]


def stage_now(drawn: int, planned: int, count: int) -> int:
    """Which of a curriculum's `count` stages holds after `drawn` draws: all levels from half of the planned ones on.

    Kim et al. 2024 (arXiv 2403.10348) go from the easy, noisy levels to all, and advance when the loss stands still;
    a seam that sees no loss advances by the count.
    """
    return min(int(drawn / (WHOLE_RANGE * max(planned, 1)) * (count - 1)), count - 1)


def logit_normal_density(time: Tensor, mean: float, spread: float) -> Tensor:
    """The density of t where logit(t) is normal (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    away = (torch.logit(time) - mean) / spread
    return torch.exp(-(away**2) / 2) / (spread * math.sqrt(2 * math.pi) * time * (1 - time))


def mode_quantile(u: Tensor, scale: float) -> Tensor:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), falling in u (Esser et al. 2024, eq. 20): more of the middle."""
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def mode_shares(n: int, scale: float) -> Tensor:
    """The shares of n equal parts of the time under `mode_quantile`, the noisiest first, [n]."""
    if not -1 <= scale <= STEEPEST_MODE:
        raise ValueError(f"The scale of the mode density goes from -1 to {STEEPEST_MODE:.3f}, but it is {scale:g}.")
    edges = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    low, high = torch.zeros_like(edges), torch.ones_like(edges)
    for _ in range(60):
        middle = (low + high) / 2
        above = mode_quantile(middle, scale) > edges
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low.diff().clamp(min=0)


def cluster_ends(values: Tensor, count: int) -> list[int]:
    """Where each of `count` clusters of sorted values [n] ends: those with the least sum of distances to their middle.

    Dynamic programming over intervals of the timesteps by log-SNR, as in Go et al. 2023 (arXiv 2306.00354).
    """
    n = len(values)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])  # [n+1]
    start, end = torch.arange(n)[:, None], torch.arange(1, n + 1)[None]  # of the interval [start, end)
    middle = ((start + end - 1) // 2).clamp(0, n - 1)
    at = values.double()[middle]
    below = at * (middle - start) - (total[middle] - total[start])
    above = total[end] - total[middle] - at * (end - middle)
    cost = (below.abs() + above.abs()).masked_fill(end <= start, math.inf)  # [start, end - 1]
    best, cuts = cost[0], []
    for _ in range(count - 1):
        before = torch.cat([torch.full((1,), math.inf, dtype=torch.float64), best[:-1]])  # of what ends at each start
        best, cut = (before[:, None] + cost).min(dim=0)
        cuts.append(cut)
    ends = [n]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1] - 1]))
    return ends[::-1]


def quantile(shares: Tensor) -> Callable[[float], float]:
    """From a uniform u to the place in 0..1 before which a share u of the draws lies; even within each of n parts."""
    n, total = len(shares), torch.cumsum(shares.double() / shares.double().sum(), 0).tolist()
    below = [0.0, *total[:-1]]
    drawn = [i for i in range(n) if total[i] > below[i]]

    def place(u: float) -> float:
        i = min(max(bisect_right(total, u), drawn[0]), drawn[-1])
        return (i + min(max((u - below[i]) / (total[i] - below[i]), 0.0), 1.0)) / n

    return place


# --- which noise goes with which picture ---


def assign(latent: Latent, noise: Latent) -> Latent:
    """The batch's own noises [b ...], each with the picture that makes the sum of distances least.

    Immiscible Diffusion (Li et al. 2024, arXiv 2406.12303): noise stays normal over the batch as a whole, and the
    pictures share less of it. Cubic in b.
    """
    return noise[assignment(torch.cdist(latent.flatten(1).float(), noise.flatten(1).float()))]


def nearest(latent: Latent, noise: Latent, draws: int, draw: Callable[[], Latent]) -> Latent:
    """For each picture [b ...] the nearest of `draws` noises: the given one, and others that `draw()` makes.

    The variant of Immiscible Diffusion for small batches (its section on KNN), at any batch size.
    """
    distance = lambda one: (one - latent).float().flatten(1).norm(dim=1)
    best, least = noise, distance(noise)
    for _ in range(draws - 1):
        other = draw()
        far = distance(other)
        closer = far < least
        best = torch.where(closer.reshape(-1, *[1] * (noise.ndim - 1)), other, best)
        least = torch.minimum(far, least)
    return best


def assignment(cost: Tensor) -> list[int]:
    """The column of each row of cost [n n] with the least sum: Kuhn 1955, by shortest augmenting paths, cubic in n."""
    costs = cost.double().cpu().numpy()
    n = len(costs)
    row_price, column_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of, came_from = np.full(n + 1, n), np.zeros(n + 1, dtype=int)  # column n is where each path begins
    for row in range(n):
        row_of[n], column = row, n
        slack, seen = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=bool)
        while row_of[column] != n:
            seen[column] = True
            reduced = costs[row_of[column]] - row_price[row_of[column]] - column_price[:n]
            better = ~seen[:n] & (reduced < slack[:n])
            slack[:n][better], came_from[:n][better] = reduced[better], column
            nearest_column = int(np.argmin(np.where(seen[:n], np.inf, slack[:n])))
            step = slack[nearest_column]
            row_price[row_of[seen]] += step
            column_price[seen] -= step
            slack[~seen] -= step
            column = nearest_column
        while column != n:
            row_of[column], column = row_of[came_from[column]], came_from[column]
    found = [0] * n
    for column, row in enumerate(row_of[:n].tolist()):
        found[row] = column
    return found
