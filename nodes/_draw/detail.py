"""What a run that starts from a picture keeps of it: signal over noise at each size of detail."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ...kernels.refine import kept_up_to, signal_to_noise
from .axes import COLOURS, INK, Axes, font, line, sheet

DECIBELS = (-30.0, 50.0)
POINTS = 80


def draw_detail(starts: Sequence[tuple[str, float]], side: int) -> Image.Image:
    """Curves of named starts, by their noise over signal: dB over detail from the whole side to two latent pixels.

    For a picture with 1/f amplitude, as photographs have on average; where a curve falls below 0 noise covers it.
    """
    picture, draw = sheet()
    finest = math.log10(side / 2)
    axes = Axes(draw, (0, finest), DECIBELS)
    sizes = [(math.log10(f), f"1/{f}" if f > 1 else "1") for f in (1, 2, 4, 8, 16, 32, 64) if f <= side / 2]
    levels = [(float(db), f"{db}") for db in range(-30, 51, 10)]
    axes.frame(sizes, levels, "Detail that the start keeps", "size of detail, as a part of the picture's side", "dB")
    line(draw, [axes.at(0, 0), axes.at(finest, 0)], INK, dashed=True)
    rows = []
    for i, (label, r) in enumerate(starts):
        colour, snr = COLOURS[i % len(COLOURS)], signal_to_noise(r, side)
        shares = [finest * j / POINTS for j in range(POINTS + 1)]
        axes.curve([(x, 10 * math.log10(snr(10**x))) for x in shares], colour)
        f = kept_up_to(r, side)
        rows.append((f"{label}: {_kept(f, side)}", colour, False))
    axes.legend(rows)
    if not starts:
        draw.text(axes.at(0.1, 0), "No schedule with a step is connected.", INK, font(18))
    return picture


def _kept(f: float, side: int) -> str:
    if f >= side / 2:
        return "all is kept"
    return "nothing is kept" if f < 1 else f"kept above 1/{f:.2g} of the side"
