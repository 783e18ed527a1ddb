"""A picture of how often a trainer draws each noise level."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ...kernels.training_noise import Levels
from .axes import COLOURS, INK, Axes, sheet

TALLEST = 6.0  # times as often as stock; what is above is drawn at the top


def draw_density(levels: Levels, stages: Sequence[Tensor], name: str) -> Image.Image:
    """The density over the training time, 1 where it is the stock one; of a curriculum each stage."""
    picture, draw = sheet()
    n = len(levels.sigma)
    top = min(max(2.0, *(1.1 * n * float(shares.max()) for shares in stages)), TALLEST)
    axes = Axes(draw, (0, 1), (0, top))
    shares_of_time = [(t, f"{1 - t:g}\nsigma {_sigma_at(levels, t):.3g}") for t in (0, 0.25, 0.5, 0.75, 1)]
    heights = [(h, f"{h:g}") for h in range(int(top) + 1)]
    axes.frame(shares_of_time, heights, "Draws over the training time", "", "times as often as stock")
    axes.curve([(0, 1), (1, 1)], INK, dashed=True)
    rows = [("stock", INK, True)]
    for i, shares in enumerate(stages):
        colour = COLOURS[i % len(COLOURS)]
        points = [((j + 0.5) / n, n * float(shares[j])) for j in range(n)]
        axes.curve(points, colour)
        rows.append((name if len(stages) == 1 else f"{name}, stage {i + 1} of {len(stages)}", colour, False))
    axes.legend(rows)
    return picture


def _sigma_at(levels: Levels, place: float) -> float:
    return float(levels.sigma[min(int(place * len(levels.sigma)), len(levels.sigma) - 1)])
