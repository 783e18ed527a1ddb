"""The picture of a calibration: how features change from step to step, and what speed costs in fidelity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..models.encoder_propagation import FIDELITY, Point

WIDTH, HEIGHT, MARGIN = 560, 400, 56
INK, GRID, KEY = (40, 40, 40), (225, 225, 225), (255, 225, 170)


def picture(changes: dict[str, list[float]], steps: int, points: Sequence[Point], chosen: Point) -> Tensor:
    """[1 h w 3] in 0..1: left the change of every feature per step, with the chosen key steps; right the curve."""
    image = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    _changes(draw, changes, steps, chosen)
    _curve(draw, points, chosen)
    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255


def _changes(draw: ImageDraw.ImageDraw, changes: dict[str, list[float]], steps: int, chosen: Point) -> None:
    values = [value for row in changes.values() for value in row if value > 0]
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (-1.0, 0.0)
    at = _axes(draw, 0, (0, max(steps - 1, 1)), (math.floor(low), max(math.ceil(high), math.floor(low) + 1)))
    for key in chosen.keys:
        (x, _), bottom = at(key, 0), HEIGHT - MARGIN
        draw.line((x, MARGIN, x, bottom), fill=KEY, width=5)
    for n, (name, row) in enumerate(changes.items()):
        colour = _colour(n, len(changes))
        line = [at(step, math.log10(max(value, 1e-9))) for step, value in enumerate(row, start=1)]
        if len(line) > 1:
            draw.line(line, fill=colour, width=2)
        draw.text((WIDTH - 70, MARGIN + 13 * n), name, fill=colour)
    draw.text((MARGIN, 12), "Change of each feature from the step before, relative (log10)", fill=INK)
    draw.text((MARGIN, 28), "bars: the chosen key steps", fill=INK)
    draw.text((WIDTH // 2, HEIGHT - 20), "step", fill=INK)


def _curve(draw: ImageDraw.ImageDraw, points: Sequence[Point], chosen: Point) -> None:
    top = max(point.speed for point in points)
    levels = [point.psnr for point in points]
    at = _axes(
        draw,
        WIDTH,
        (1.0, math.ceil(top * 4) / 4),
        (10 * math.floor(min([*levels, FIDELITY]) / 10), 10 * math.ceil(max([*levels, FIDELITY]) / 10 + 0.01)),
    )
    line = [at(point.speed, point.psnr) for point in points]
    if len(line) > 1:
        draw.line(line, fill=(30, 90, 200), width=2)
    for x, y in line:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(30, 90, 200))
    x, y = at(chosen.speed, chosen.psnr)
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=(200, 60, 30), width=2)
    draw.text((WIDTH + MARGIN, 12), "Fidelity to the run without reuse (dB) over speed", fill=INK)
    draw.text((WIDTH + MARGIN, 28), "ring: the setting of 'calibrated profile'", fill=INK)
    draw.text((WIDTH + WIDTH // 2 - 60, HEIGHT - 20), "times less computing", fill=INK)


def _axes(draw: ImageDraw.ImageDraw, left: int, x_range: tuple[float, float], y_range: tuple[float, float]):
    """Grid and numbers of one panel; the function that places a point in it."""
    x0, x1, y0, y1 = left + MARGIN, left + WIDTH - 80, HEIGHT - MARGIN, MARGIN

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            x0 + (x - x_range[0]) / (x_range[1] - x_range[0]) * (x1 - x0),
            y0 + (y - y_range[0]) / (y_range[1] - y_range[0]) * (y1 - y0),
        )

    for n in range(6):
        x, y = (a + (b - a) * n / 5 for a, b in (x_range, y_range))
        (px, _), (_, py) = at(x, y_range[0]), at(x_range[0], y)
        draw.line((px, y1, px, y0), fill=GRID)
        draw.line((x0, py, x1, py), fill=GRID)
        draw.text((px - 8, y0 + 6), f"{x:.4g}", fill=INK)
        draw.text((left + 12, py - 6), f"{y:.3g}", fill=INK)
    draw.rectangle((x0, y1, x1, y0), outline=INK)
    return at


def _colour(n: int, count: int) -> tuple[int, int, int]:
    """From blue (the first feature) to red (the last)."""
    share = n / max(count - 1, 1)
    return (int(40 + 190 * share), int(90 + 60 * math.sin(math.pi * share)), int(210 - 180 * share))
