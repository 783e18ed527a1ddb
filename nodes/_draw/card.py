"""A picture that says what a fitted sampler gave on one machine, to be shared."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...models.calibration import Calibration
from .axes import INK, font, sheet
from .schedules import Curve, draw_schedules

SIDE, SPACE, LINE = 300, 24, 26  # of the two pictures, between parts, of a line of text


def draw_card(profile: Calibration, facts: Sequence[str], pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """The profile's name and facts above, its levels on the left, the pictures with their names on the right."""
    long = Curve(f"{profile.steps} steps of {profile.solver}", profile.sigmas)
    plot = draw_schedules([long, *(Curve(f"{one.run.steps} steps", one.run.sigmas) for one in profile.runs[:4])])
    top = 2 * SPACE + LINE * (len(facts) + 2)
    height = top + max(plot.height, len(pictures) * (SIDE + LINE + SPACE))
    card, draw = sheet(plot.width + SIDE + 2 * SPACE, height)
    draw.text((SPACE, SPACE), profile.name, INK, font(22, profile.name))
    for i, fact in enumerate(facts):
        draw.text((SPACE, SPACE + LINE * (i + 1.5)), fact, INK, font(16, fact))
    card.paste(plot, (0, top))
    for i, (name, picture) in enumerate(pictures):
        y, scale = top + i * (SIDE + LINE + SPACE), SIDE / max(picture.size)
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        draw.text((plot.width + SPACE, y), name, INK, font(16, name))
        card.paste(picture.resize(size, Image.Resampling.BICUBIC), (plot.width + SPACE, y + LINE))
    return card
