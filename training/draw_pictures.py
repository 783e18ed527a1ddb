"""The pack's hand-made pictures, drawn with the pen of this file and by no model: `python training/draw_pictures.py`.

An apple, a cat and a heart in flat colours, 512 x 512, for the workflows that edit real pictures. Written to
models/pictures.
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

OUT = Path(__file__).resolve().parents[1] / "models" / "pictures"
SIDE, OVER = 512, 4  # pixels; drawn so many times larger, then reduced
INK = "#3a1d14"


class Pen:
    """Shapes in units of the picture's side, outlined as with a felt pen."""

    def __init__(self, background: str):
        self.image = Image.new("RGB", (SIDE * OVER, SIDE * OVER), background)
        self._draw = ImageDraw.Draw(self.image)

    def shape(self, points: list[tuple[float, float]], fill: str, line: float = 0.012) -> None:
        self._draw.polygon([self._at(p) for p in points], fill)
        if line:
            self.line([*points, points[0], points[1]], INK, line)

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        size = width * SIDE * OVER
        self._draw.line([self._at(p) for p in points], colour, round(size), joint="curve")
        for x, y in (self._at(points[0]), self._at(points[-1])):
            self._draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), colour)

    def oval(
        self, x: float, y: float, wide: float, high: float, fill: str, tilt: float = 0.0, line: float = 0.0
    ) -> None:
        turn = [(math.cos(a) * wide, math.sin(a) * high) for a in (2 * math.pi * i / 120 for i in range(120))]
        c, s = math.cos(tilt), math.sin(tilt)
        self.shape([(x + c * u - s * v, y + s * u + c * v) for u, v in turn], fill, line)

    def save(self, name: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(OUT / f"{name}.png", optimize=True)

    @staticmethod
    def _at(point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * SIDE * OVER, point[1] * SIDE * OVER


def apple() -> None:
    pen = Pen("#96cdf5")
    around = []
    for i in range(200):
        a = 2 * math.pi * i / 200
        size = 0.36 * (
            1 - 0.16 * math.exp(-((math.sin(a) + 1) ** 2) / 0.05) - 0.06 * math.exp(-((math.sin(a) - 1) ** 2) / 0.03)
        )
        around.append((0.5 + 1.02 * size * math.cos(a), 0.56 + size * math.sin(a)))
    pen.shape(around, "#d8202c")
    pen.oval(0.36, 0.47, 0.05, 0.10, "#f58a86", tilt=0.4)
    pen.line([(0.50, 0.30), (0.51, 0.22), (0.54, 0.14)], "#6b3f1d", 0.03)
    pen.oval(0.64, 0.18, 0.11, 0.05, "#3f9c35", tilt=-0.35, line=0.010)
    pen.save("apple")


def cat() -> None:
    pen = Pen("#f5f2e8")
    for side in (-1, 1):
        x = lambda u, side=side: 0.5 + side * u
        pen.shape([(x(0.33), 0.46), (x(0.31), 0.12), (x(0.08), 0.30)], "#f0a03c")
        pen.shape([(x(0.28), 0.36), (x(0.275), 0.20), (x(0.16), 0.29)], "#f7b9a8", line=0)
    pen.oval(0.5, 0.56, 0.36, 0.32, "#f0a03c", line=0.012)
    pen.oval(0.5, 0.70, 0.19, 0.13, "#fdf3e3")
    for side in (-1, 1):
        pen.oval(0.5 + side * 0.15, 0.52, 0.055, 0.07, "#2b2b2b")
        pen.oval(0.5 + side * 0.15 + 0.015, 0.49, 0.018, 0.022, "#ffffff")
        for lift in (-0.03, 0.01, 0.05):
            pen.line([(0.5 + side * 0.20, 0.68 + lift / 2), (0.5 + side * 0.42, 0.66 + lift)], INK, 0.006)
        pen.line([(0.5, 0.68), (0.5 + side * 0.03, 0.72), (0.5 + side * 0.09, 0.72)], INK, 0.010)
    pen.shape([(0.46, 0.63), (0.54, 0.63), (0.5, 0.68)], "#e0717a", line=0.006)
    for x in (-0.08, 0.0, 0.08):
        pen.line([(0.5 + x, 0.27), (0.5 + 0.7 * x, 0.36)], "#b86a17", 0.022)
    pen.save("cat")


def heart() -> None:
    pen = Pen("#96cdf5")
    turns = [2 * math.pi * i / 200 for i in range(200)]
    around = [
        (
            0.5 + 0.0235 * 16 * math.sin(a) ** 3,
            0.48 - 0.0235 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in turns
    ]
    pen.shape(around, "#e3242b")
    pen.oval(0.32, 0.33, 0.05, 0.075, "#f7908f", tilt=0.5)
    pen.save("heart")


if __name__ == "__main__":
    for draw in (apple, cat, heart):
        draw()
