"""A contact sheet: numbered pictures in rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from .axes import INK, font, sheet
from .compare import GAP, fit_text, scaled

LABEL = 24  # pixels above each picture


def draw_contact_sheet(images: Tensor, labels: Sequence[str], side: int) -> Image.Image:
    """Pictures [n h w 3] from 0 to 1, `side` pixels wide, as many columns as rows or more, each under its label."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height = max(round(side * images.shape[1] / images.shape[2]), 1)
    picture, draw = sheet(columns * (side + GAP) + GAP, rows * (LABEL + height + GAP) + GAP)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = GAP + i % columns * (side + GAP), GAP + i // columns * (LABEL + height + GAP)
        draw.text((x, y), fit_text(draw, label, side, 16), INK, font(16))
        picture.paste(scaled(image, side, height), (x, y + LABEL))
    return picture
