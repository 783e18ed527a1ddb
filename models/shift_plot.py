"""The picture of a noise shift: what the network is told over the true noise level, one curve a picture size."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from .noise_shift import noise_word, shift_for
from .plots import BOTTOM, COLOURS, FAINT, HEIGHT, INK, LEFT, PAPER, RIGHT, TOP, WIDTH, font, line
from .profiles import Profile

LEAST_REACH = math.log(1.25)  # the axis shows at least ratios from 1/1.25 to 1.25


def draw_shift(profile: Profile) -> Image.Image:
    """The ratio told / true of a flow's odds or of sigma, over sigma, with dots at the calibrated levels."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT, 16), profile.name if len(profile.name) <= 48 else f"{profile.name[:47]}…", INK, font(22))
    curves = {one.resolution: shift_for(profile, one.resolution)[0] for one in profile.alignments}
    ends = [at for curve in curves.values() for at in curve.at]
    low, high = min(ends), max(ends)
    reach = 1.1 * max(LEAST_REACH, *(abs(offset) for curve in curves.values() for offset in curve.offset))

    def place(log_ratio: float, offset: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (log_ratio - low) / (high - low)
        return x, (HEIGHT - BOTTOM + TOP) / 2 - offset / reach * (HEIGHT - TOP - BOTTOM) / 2

    _frame(draw, profile.space, place, (low, high), reach)
    for i, (size, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [place(at, offset) for at, offset in zip(curve.at, curve.offset, strict=True)]
        line(draw, points, colour, dashed=i >= len(COLOURS))
        for x, y in points[1:-1]:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        y = TOP + 14 + 22 * i
        draw.text((WIDTH - RIGHT - 54, y), "x".join(map(str, size)), INK, font(16), anchor="rm")
        line(draw, [(WIDTH - RIGHT - 46, y), (WIDTH - RIGHT - 10, y)], colour, dashed=i >= len(COLOURS))
    return picture


def _frame(draw: ImageDraw.ImageDraw, space: str, place, ends: tuple[float, float], reach: float) -> None:
    small, bottom = font(15), HEIGHT - BOTTOM
    ratios = (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 8)
    shown = [ratio for ratio in ratios if abs(math.log(ratio)) <= reach]
    for ratio in shown:
        _, y = place(ends[0], math.log(ratio))
        draw.line((LEFT, y, WIDTH - RIGHT, y), INK if ratio == 1 else FAINT)
        draw.text((LEFT - 10, y), f"{ratio:g}", INK, small, anchor="rm")
    for sigma in (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999, 1, 3, 10, 30, 100):
        if (space == "flow" and sigma >= 1) or (space == "ve" and sigma in (0.5, 0.7, 0.9, 0.97, 0.99, 0.999)):
            continue
        at = math.log(sigma) if space == "ve" else math.log(sigma / (1 - sigma))
        if ends[0] <= at <= ends[1]:
            x, _ = place(at, 0)
            draw.line((x, TOP, x, bottom), FAINT)
            draw.text((x, bottom + 8), f"{sigma:g}", INK, small, anchor="ma")
    draw.line((LEFT, TOP, LEFT, bottom, WIDTH - RIGHT, bottom), INK, 2)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 28), "sigma", INK, small, anchor="ma")
    draw.text((WIDTH - RIGHT, TOP - 10), f"told / true {noise_word(space)}", INK, small, anchor="rb")
