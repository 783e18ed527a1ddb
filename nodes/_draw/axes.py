"""Axes for small plots, drawn with Pillow alone on paper of their own: readable in dark and light themes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 92, 24, 54, 70  # margins of the plot area
PAPER, INK, FAINT = (250, 250, 248), (32, 33, 36), (214, 214, 210)
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 135, 95), (170, 68, 136), (90, 90, 90)]  # told apart by colour-blind eyes

FONTS = (  # of systems, with Chinese, Japanese, Korean, Cyrillic and other letters
    "NotoSans-Regular.ttf", "arial.ttf", "msyh.ttc", "YuGothM.ttc", "meiryo.ttc", "malgun.ttf", "segoeui.ttf",
    "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "NanumGothic.ttf", "ipag.ttf", "DejaVuSans.ttf",
)  # fmt: skip

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Ticks = Iterable[tuple[float, str]]


def sheet(width: int = WIDTH, height: int = HEIGHT) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def to_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE: [1 h w 3], float32 from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


@dataclass(frozen=True)
class Axes:
    """A rectangle `box` whose sides mean `x` and `y` (lowest, highest)."""

    draw: ImageDraw.ImageDraw
    x: tuple[float, float]
    y: tuple[float, float]
    box: Box = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point; beyond the axes, on their edge."""
        left, top, right, bottom = self.box
        across, up = (
            (min(max(value, low), high) - low) / (high - low) for value, (low, high) in ((x, self.x), (y, self.y))
        )
        return left + across * (right - left), bottom - up * (bottom - top)

    def frame(self, x_ticks: Ticks, y_ticks: Ticks, title: str, x_name: str, y_name: str = "") -> None:
        """Grid, numbers and names; the title stands above."""
        left, top, right, bottom = self.box
        small = font(15)
        for y, text in y_ticks:
            height = self.at(self.x[0], y)[1]
            self.draw.line((left, height, right, height), FAINT)
            self.draw.text((left - 10, height), text, INK, small, anchor="rm")
        for x, text in x_ticks:
            across = self.at(x, self.y[0])[0]
            self.draw.line((across, top, across, bottom), FAINT)
            self.draw.text((across, bottom + 8), text, INK, small, anchor="ma")
        self.draw.line((left, top, left, bottom, right, bottom), INK, 2)
        self.draw.text(((left + right) / 2, bottom + 42), x_name, INK, small, anchor="ma")
        self.draw.text((left, top - 38), clipped(title, 60), INK, font(22, title))
        self.draw.text((right, top - 10), y_name, INK, small, anchor="rb")

    def curve(
        self, points: Sequence[tuple[float, float]], colour: Colour, dashed: bool = False, dots: int = 0
    ) -> None:  # fmt: skip
        """A line through points of the axes, with discs of radius `dots`."""
        pixels = [self.at(*point) for point in points]
        line(self.draw, pixels, colour, dashed)
        for x, y in pixels if dots else ():
            self.draw.ellipse((x - dots, y - dots, x + dots, y + dots), colour)

    def legend(self, rows: Iterable[tuple[str, Colour, bool]]) -> None:
        """Label, colour and whether dashed, from the upper right corner down."""
        _, top, right, _ = self.box
        for i, (label, colour, dashed) in enumerate(rows):
            y = top + 14 + 22 * i
            self.draw.text((right - 58, y), clipped(label, 60), INK, font(16, label), anchor="rm")
            line(self.draw, [(right - 48, y), (right - 14, y)], colour, dashed)


def line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: Colour, dashed: bool = False) -> None:
    for (x0, y0), (x1, y1) in pairwise(points):
        pieces = max(int(math.hypot(x1 - x0, y1 - y0) / 7), 1) if dashed else 1
        for i in range(0, pieces, 2):
            a, b = i / pieces, (i + 1) / pieces
            draw.line((x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0)), colour, 3)


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@lru_cache(maxsize=256)
def font(size: int, text: str = "") -> Font:
    """Pillow's own font, which needs no file; one of the system's for a text whose letters it lacks."""
    try:
        own = ImageFont.load_default(size=size)
    except (TypeError, ImportError):  # a Pillow before 10.1, or one without FreeType: one small bitmap font
        return ImageFont.load_default()
    if writes(own, text):
        return own
    for name in FONTS:
        try:
            found = ImageFont.truetype(name, size)
        except OSError:
            continue
        if writes(found, text):
            return found
    return own


def labels_of(text: str) -> list[str]:
    """The names in a text with commas between, those of Chinese and Japanese keyboards too."""
    return [name.strip() for name in re.split("[,\uff0c\u3001]", text)] if text.strip() else []


def writes(one: Font, text: str) -> bool:
    """Whether a font has a letter of its own for each of a text: what it lacks is drawn as it draws no character."""
    if text.isascii():
        return True
    if not isinstance(one, ImageFont.FreeTypeFont):
        return False
    drawn = lambda letter: (one.getbbox(letter), bytes(one.getmask(letter)))
    return all(letter.isspace() or drawn(letter) != drawn("\U0010ffff") for letter in set(text))
