"""A picture of what a coarser attention does at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from .axes import COLOURS, FAINT, Axes, sheet


def draw_errors(errors: Sequence[float], exact: Sequence[int] | None) -> Image.Image:
    """The change of the guided answer by step, the steps that keep exact attention shaded; None: all of them."""
    picture, draw = sheet()
    heights = [math.log10(max(error, 1e-9)) for error in errors]
    low, high = math.floor(min(heights)), math.ceil(max(heights) + 1e-9)
    axes = Axes(draw, (-0.5, len(errors) - 0.5), (low, max(high, low + 1)))
    for i in range(len(errors)) if exact is None else exact:
        (left, top), (right, bottom) = axes.at(i - 0.5, axes.y[1]), axes.at(i + 0.5, low)
        draw.rectangle((left, top, right, bottom), FAINT)
    axes.frame(
        [(i, str(i)) for i in range(0, len(errors), max(1, len(errors) // 10))],
        [(h, f"{10.0**h:g}") for h in range(low, int(axes.y[1]) + 1)],
        "What the faster attention changes", "step; shaded: exact attention", "rms of the guided answer",
    )  # fmt: skip
    axes.curve(list(enumerate(heights)), COLOURS[0], dots=4)
    return picture
