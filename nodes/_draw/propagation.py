"""The picture of a calibration: how features change from step to step, and what speed costs in fidelity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from ...models.calibration import Point
from .._plan.propagation import FIDELITY
from .axes import COLOURS, INK, Axes, Box, Colour, sheet

SHEET_WIDTH, SHEET_HEIGHT = 1280, 480
CHANGES, CURVE = (80, 60, 620, 400), (740, 60, 1250, 400)  # the two panels
SECOND_ALONE = (80, 60, 590, 400)  # the second without the first
KEY_STEP = (255, 225, 170)


def draw_calibration(
    changes: Mapping[str, Sequence[float]], steps: int, points: Sequence[Point], chosen: Point | None
) -> Image.Image:
    """Left the change of every feature per step, with the chosen key steps; right fidelity over speed, where a setting
    was tried."""
    picture, draw = sheet(SHEET_WIDTH, SHEET_HEIGHT)
    values = [value for row in changes.values() for value in row if value > 0] or [0.1, 1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    axes = Axes(draw, (0, max(steps - 1, 1)), (low, high), CHANGES)
    for key in chosen.keys if chosen else ():
        draw.line((*axes.at(key, low), *axes.at(key, high)), KEY_STEP, 5)
    axes.frame(
        [(step, str(step)) for step in range(0, steps, max(1, steps // 8))],
        [(decade, f"{10.0**decade:g}") for decade in range(low, high + 1)],
        "Change of each feature from the step before", "step; bars: the chosen key steps", "relative",
    )  # fmt: skip
    rows = []
    for n, (name, row) in enumerate(changes.items()):
        colour = _colour(n, len(changes))
        axes.curve([(i, math.log10(max(value, 1e-9))) for i, value in enumerate(row, start=1)], colour)
        rows.append((name, colour, False))
    axes.legend(rows[:: max(1, len(rows) // 8)])
    if chosen:
        _speeds(draw, points, chosen, CURVE)
    return picture


def draw_speeds(points: Sequence[Point], chosen: Point | None, wanted: float = FIDELITY) -> Image.Image:
    """Fidelity over speed alone, of a profile that is applied; chosen: None where none is as faithful as wanted."""
    picture, draw = sheet(SHEET_WIDTH // 2, SHEET_HEIGHT)
    _speeds(draw, points, chosen, SECOND_ALONE, wanted)
    return picture


def _speeds(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], chosen: Point | None, box: Box, wanted: float = FIDELITY
) -> None:
    levels = [wanted, *(point.psnr for point in points)]
    low, high = 10 * math.floor(min(levels) / 10), 10 * math.ceil(max(levels) / 10 + 0.01)
    fastest = math.ceil(4 * max(point.speed for point in points)) / 4 + 0.25
    axes = Axes(draw, (1.0, fastest), (low, high), box)
    quarters = range(4, round(4 * fastest) + 1, max(1, round(fastest) - 1))
    axes.frame(
        [(n / 4, f"{n / 4:g}") for n in quarters], [(db, str(db)) for db in range(low, high + 1, 10)],
        "Fidelity to the run without reuse",
        f"times less computing; {'every step runs whole' if chosen is None else 'ring: the setting that runs'}", "dB",
    )  # fmt: skip
    axes.curve([(axes.x[0], wanted), (fastest, wanted)], COLOURS[4], dashed=True)
    axes.curve([(point.speed, point.psnr) for point in points], COLOURS[0], dots=4)
    if chosen is None:
        return
    x, y = axes.at(chosen.speed, chosen.psnr)
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), outline=INK, width=3)


def _colour(n: int, count: int) -> Colour:
    """From blue (the first feature) to red (the last)."""
    share = n / max(count - 1, 1)
    return (int(20 + 180 * share), int(70 + 30 * math.sin(math.pi * share)), int(190 - 160 * share))
