"""Pictures of schedules: noise levels over the run on a logarithmic axis, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .profiles import Profile, alignment_map
from .schedules import resample_profile

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 92, 24, 54, 70  # margins of the plot area
PAPER, INK, FAINT = (250, 250, 248), (32, 33, 36), (214, 214, 210)  # its own paper: readable in dark and light themes
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 135, 95), (170, 68, 136), (90, 90, 90)]  # told apart by colour-blind eyes
LOWEST = 1e-6  # smaller levels are drawn here


@dataclass(frozen=True)
class Curve:
    """Levels of one run, the last may be 0; `told`: what the network is told at each of them, or None."""

    label: str
    sigmas: tuple[float, ...]
    told: tuple[float, ...] | None = None


def profile_curve(profile: Profile) -> Curve:
    """The levels of a profile's native run, or the knots of its first alignment, and what the network is told there."""
    aligned = profile.alignments[0] if profile.alignments else None
    if profile.sigmas:
        sigmas = tuple(resample_profile(profile, profile.steps).tolist())
    else:
        sigmas = tuple(reversed(aligned.sigma if aligned else ()))
    told = None
    if aligned is not None:
        told = tuple(alignment_map(profile, aligned)(torch.tensor(sigmas, dtype=torch.float64)).tolist())
    return Curve(profile.name, sigmas, told)


def draw_schedules(curves: Sequence[Curve], title: str = "Noise levels") -> Image.Image:
    """The curves over the share of the run, one dot a level; what the network is told is dashed.

    The axis ends one tick below the lowest positive level; a final 0 is drawn on the baseline.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT, 16), title, INK, font(22))
    positive = [s for curve in curves for s in (*curve.sigmas, *(curve.told or ())) if s > 0 and math.isfinite(s)]
    if not positive:
        draw.text((LEFT, HEIGHT // 2), "No noise levels: the run has no step.", INK, font(18))
        return picture
    low = math.log10(max(min(positive), LOWEST)) - 0.25
    high = max(math.log10(max(positive)), low + 0.5) + 0.08
    _axes(draw, low, high)
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        if curve.told is not None:
            line(draw, _points(curve.told, low, high), colour, dashed=True)
        points = _points(curve.sigmas, low, high)
        line(draw, points, colour)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    _legend(draw, curves)
    return picture


def to_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE: [1 h w 3], float32 from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _points(sigmas: Sequence[float], low: float, high: float) -> list[tuple[float, float]]:
    steps = max(len(sigmas) - 1, 1)
    return [
        (LEFT + (WIDTH - LEFT - RIGHT) * i / steps, _height(math.log10(s) if s > 0 else low, low, high))
        for i, s in enumerate(sigmas)
    ]


def _height(log_sigma: float, low: float, high: float) -> float:
    share = (min(max(log_sigma, low), high) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(draw: ImageDraw.ImageDraw, low: float, high: float) -> None:
    small, bottom = font(15), HEIGHT - BOTTOM
    for tick in _ticks(low, high):
        y = _height(math.log10(tick), low, high)
        draw.line((LEFT, y, WIDTH - RIGHT, y), FAINT)
        draw.text((LEFT - 10, y), f"{tick:g}", INK, small, anchor="rm")
    draw.text((LEFT - 10, bottom), "0", INK, small, anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * share
        draw.line((x, TOP, x, bottom), FAINT)
        draw.text((x, bottom + 8), f"{share:.0%}", INK, small, anchor="ma")
    draw.line((LEFT, TOP, LEFT, bottom, WIDTH - RIGHT, bottom), INK, 2)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 28), "share of the run's steps", INK, small, anchor="ma")
    draw.text((LEFT - 10, TOP - 8), "sigma", INK, small, anchor="rb")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade while they are few, else 1 alone; never so near the baseline as to touch its 0."""
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [step * 10.0**decade for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if low + 0.05 * (high - low) < math.log10(tick) <= high]


def line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour, dashed: bool = False) -> None:
    for (x0, y0), (x1, y1) in pairwise(points):
        pieces = max(int(math.hypot(x1 - x0, y1 - y0) / 7), 1) if dashed else 1
        for i in range(0, pieces, 2):
            a, b = i / pieces, (i + 1) / pieces
            draw.line((x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0)), colour, 3)


def _legend(draw: ImageDraw.ImageDraw, curves: Sequence[Curve]) -> None:
    small, y = font(16), TOP + 12
    rows = [(curve.label, COLOURS[i % len(COLOURS)], False) for i, curve in enumerate(curves)]
    rows += [
        (f"{curve.label}: told to the network", COLOURS[i % len(COLOURS)], True)
        for i, curve in enumerate(curves) if curve.told is not None
    ]  # fmt: skip
    for label, colour, dashed in rows:
        label = label if len(label) <= 60 else f"{label[:59]}…"
        right = WIDTH - RIGHT - 14
        draw.text((right - 44, y), label, INK, small, anchor="rm")
        line(draw, [(right - 34, y), (right, y)], colour, dashed)
        y += 24


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which needs no file."""
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, ImportError):  # a Pillow before 10.1, or one without FreeType: one small bitmap font
        return ImageFont.load_default()
