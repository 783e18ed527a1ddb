"""The picture of a noise shift: what the network is told over the true noise level, one curve a picture size."""

from __future__ import annotations

import math

from PIL import Image

from ...kernels.space import NoiseSpace
from ...models.calibration import Calibration, Size
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
    curves = {one.resolution: shift_for(profile, one.resolution)[0] for one in profile.alignments}
    ends = [at for curve in curves.values() for at in curve.at]
    offsets = [offset for curve in curves.values() for offset in curve.offset]
    picture, axes = _ratios(profile.space, ends, offsets, profile.name)
    rows = []
    for i, (size, curve) in enumerate(curves.items()):
        colour, dashed = COLOURS[i % len(COLOURS)], i >= len(COLOURS)
        points = list(zip(curve.at, curve.offset, strict=True))
        axes.curve(points, colour, dashed)
        axes.curve(points[1:-1], colour, dashed, dots=3)
        rows.append(("x".join(map(str, size)), colour, dashed))
    axes.legend(rows)
    return picture


def draw_search(least: dict[float, float], space: NoiseSpace, size: Size) -> Image.Image:
    """The offset with the least loss at each level that is done, of a fit that goes on."""
    points = [(_place(sigma, space.kind), offset) for sigma, offset in least.items()]
    whole = [_place(sigma, space.kind) for sigma in (LEVELS[space.kind][0], LEVELS[space.kind][-1])]
    title = f"Best so far, {'x'.join(map(str, size))}"
    picture, axes = _ratios(space.kind, whole, [offset for _, offset in points], title)
    axes.curve(points, COLOURS[0], dots=4)
    return picture


def _place(sigma: float, space: str) -> float:
    """Where a level stands on the axis."""
    return math.log(sigma / (1 - sigma) if space == "flow" else sigma)


def _ratios(space: str, ends: list[float], offsets: list[float], title: str) -> tuple[Image.Image, Axes]:
    """Paper with axes for the ratio told / true over sigma, and the line of what is told truly."""
    picture, draw = sheet()
    reach = 1.1 * max(LEAST_REACH, *map(abs, offsets))
    axes = Axes(draw, (min(ends), max(ends)), (-reach, reach))
    levels = [(_place(sigma, space), f"{sigma:g}") for sigma in LEVELS[space]]
    ratios = [(math.log(ratio), f"{ratio:g}") for ratio in RATIOS if abs(math.log(ratio)) <= reach]
    levels = [(at, text) for at, text in levels if axes.x[0] <= at <= axes.x[1]]
    axes.frame(levels, ratios, title, "sigma", f"told / true {noise_word(space)}")
    line(draw, [axes.at(axes.x[0], 0), axes.at(axes.x[1], 0)], INK)
    return picture, axes
