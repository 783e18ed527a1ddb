"""The picture of a noise shift: what the network is told over the true noise level, one curve a picture size."""

from __future__ import annotations

import math

from PIL import Image

from ...models.calibration import Calibration
from .._plan.noise_shift import noise_word, shift_for
from .axes import COLOURS, INK, Axes, line, sheet

LEAST_REACH = math.log(1.25)  # the axis shows at least ratios from 1/1.25 to 1.25
RATIOS = (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 8)
LEVELS = {
    "flow": (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999),
    "ve": (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
}


def draw_shift(profile: Calibration) -> Image.Image:
    """The ratio told / true of a flow's odds or of sigma, over sigma, with dots at the calibrated levels."""
    picture, draw = sheet()
    curves = {one.resolution: shift_for(profile, one.resolution)[0] for one in profile.alignments}
    ends = [at for curve in curves.values() for at in curve.at]
    reach = 1.1 * max(LEAST_REACH, *(abs(offset) for curve in curves.values() for offset in curve.offset))
    axes = Axes(draw, (min(ends), max(ends)), (-reach, reach))
    levels = [(math.log(s / (1 - s) if profile.space == "flow" else s), f"{s:g}") for s in LEVELS[profile.space]]
    ratios = [(math.log(ratio), f"{ratio:g}") for ratio in RATIOS if abs(math.log(ratio)) <= reach]
    levels = [(at, text) for at, text in levels if axes.x[0] <= at <= axes.x[1]]
    axes.frame(levels, ratios, profile.name, "sigma", f"told / true {noise_word(profile.space)}")
    line(draw, [axes.at(axes.x[0], 0), axes.at(axes.x[1], 0)], INK)
    rows = []
    for i, (size, curve) in enumerate(curves.items()):
        colour, dashed = COLOURS[i % len(COLOURS)], i >= len(COLOURS)
        points = list(zip(curve.at, curve.offset, strict=True))
        axes.curve(points, colour, dashed)
        axes.curve(points[1:-1], colour, dashed, dots=3)
        rows.append(("x".join(map(str, size)), colour, dashed))
    axes.legend(rows)
    return picture
