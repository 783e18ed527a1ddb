"""The picture of a training that goes on: what the network explains of prompts that it has not seen, by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from .axes import COLOURS, INK, Axes, line, sheet

LEAST = 10  # per cent: the axis shows at least so many above and below 0


def draw_learning(explained: Sequence[float], epochs: int) -> Image.Image:
    """explained: a share of the golden noise for each epoch so far, below 0 where the network does harm."""
    picture, draw = sheet()
    values = [100 * max(one, -1.0) for one in explained]
    low = -LEAST * math.ceil(max(-min(values), LEAST) / LEAST)
    high = LEAST * math.ceil(max(*values, LEAST) / LEAST)
    axes = Axes(draw, (0, epochs), (low, high))
    axes.frame(
        [(i, str(i)) for i in range(0, epochs + 1, max(1, epochs // 10))],
        [(value, str(value)) for value in range(low, high + 1, LEAST * max(1, (high - low) // (10 * LEAST)))],
        "What the network explains of unseen prompts", "epoch", "% of the golden noise",
    )  # fmt: skip
    line(draw, [axes.at(0, 0), axes.at(epochs, 0)], INK)
    axes.curve(list(enumerate(values, start=1)), COLOURS[0], dots=4)
    return picture
