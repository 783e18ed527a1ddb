"""Pictures laid out with labels: the grid of Attune Compare, the numbered drafts of a sheet, the card of a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...models.calibration import Calibration
from .axes import COLOURS, FAINT, INK, PAPER, font, sheet, writes
from .plots import Curve, draw_schedules

GAP, HEAD = 8, 52  # pixels between pictures, and above each column
MOST_PIXELS = 100_000_000  # pixels of a grid; as IMAGE they are 1.2 GB
BINS = 64  # of the brightness histogram
HISTOGRAM = 220  # height of its panel, in pixels
LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue (ITU-R BT.709)


@dataclass(frozen=True)
class Batch:
    """Pictures of one column: [b h w 3], from 0 to 1."""

    label: str
    images: Tensor


def brightness(images: Tensor) -> Tensor:
    """Luma of every pixel, from 0 to 1: [… 3] -> […]."""
    return images[..., :3].float().clamp(0, 1) @ torch.tensor(LUMA)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures from 0 to 1, in dB; infinite for equal ones."""
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def difference(a: Tensor, b: Tensor, gain: float) -> Tensor:
    """gain * |a - b|, largest over the colours, on a scale from black through orange to white: [… 3]."""
    strength = (gain * (a.float() - b.float()).abs().amax(-1, keepdim=True)).clamp(0, 1)
    return torch.cat([(2 * strength).clamp(max=1), strength, (2 * strength - 1).clamp(min=0)], -1)


def histogram(images: Tensor) -> Tensor:
    """Share of the pixels that are numbers in each of BINS equal classes of brightness: [BINS], sums to 1."""
    counts = torch.histc(brightness(images[images.isfinite().all(-1)]), BINS, 0, 1)
    return counts / counts.sum().clamp(min=1)


def draw_comparison(batches: Sequence[Batch], gain: float, with_histogram: bool, side: int, rows: int) -> Image.Image:
    """The batches as columns, at most `rows` pictures each, `side` pixels wide.

    gain: with more than 0, columns for the difference of every batch to the first are added. A batch of one picture is
    compared with every picture of the first; pictures of another size are scaled for display, and have no difference.
    Raises ValueError where the grid would have more than MOST_PIXELS pixels.
    """
    batches = [Batch(written(batch.label, i), batch.images) for i, batch in enumerate(batches)]
    first, rest = batches[0], batches[1:]
    columns = [(batch.label, _facts(batch, first), batch.images) for batch in batches]
    if gain > 0:
        columns += [_difference_column(batch, first, gain) for batch in rest]
    rows = min(rows, max(len(images) for _, _, images in columns))
    high, wide = first.images.shape[1:3]
    height = max(round(side * high / wide), 1)
    panel = HISTOGRAM + GAP if with_histogram else 0
    size = (len(columns) * (side + GAP) + GAP, HEAD + rows * (height + GAP) + panel)
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(too_large(size, side, rows))
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (label, facts, images) in enumerate(columns):
        x = GAP + i * (side + GAP)
        colour = COLOURS[i % len(COLOURS)] if with_histogram and i < len(batches) else INK
        draw.text((x, 8), fit_text(draw, label, side, 17), colour, font(17, label))
        draw.text((x, 30), fit_text(draw, facts, side, 13), INK, font(13, facts))
        for j in range(min(rows, len(images))):
            picture.paste(scaled(images[j], side, height), (x, HEAD + j * (height + GAP)))
    if with_histogram:
        _draw_histogram(draw, batches, HEAD + rows * (height + GAP), size[0])
    return picture


def written(label: str, place: int) -> str:
    """The label, or the input's name where no font of this machine has its letters."""
    return label if writes(font(17, label), label) else f"image {place + 1}"


def too_large(size: tuple[int, int], side: int, rows: int) -> str:
    fits = max((math.isqrt(MOST_PIXELS * side**2 // (size[0] * size[1])) - GAP) // 8 * 8, 8)
    return (
        f"The grid of Attune Compare would have {size[0]} x {size[1]} pixels; at most {MOST_PIXELS // 10**6} million "
        f"are drawn. Set 'width' to {fits} or less, or 'rows' to less than {rows}."
    )


def _facts(batch: Batch, first: Batch) -> str:
    """Mean brightness, and how near the batch is to the first; or which share of its pixels are no numbers."""
    broken = float((~batch.images.isfinite()).any(-1).float().mean())
    if broken:
        return f"not numbers: {100 * broken:.3g} % of the pixels"
    told = f"brightness {100 * float(brightness(batch.images).mean()):.1f} %"
    if batch is first or not _comparable(batch, first):
        return told
    near = psnr(batch.images, first.images.expand(len(batch.images), -1, -1, -1))
    return f"{told}, identical" if math.isinf(near) else f"{told}, {near:.1f} dB to {first.label}"


def _comparable(batch: Batch, first: Batch) -> bool:
    return (
        _finite(batch, first)
        and batch.images.shape[1:] == first.images.shape[1:]
        and (len(first.images) == 1 or len(batch.images) == len(first.images))
    )


def _finite(*batches: Batch) -> bool:
    return all(bool(batch.images.isfinite().all()) for batch in batches)


def _difference_column(batch: Batch, first: Batch, gain: float) -> tuple[str, str, Tensor]:
    label = f"{batch.label}: difference"
    if not _comparable(batch, first):
        why = (
            f"other size or number than {first.label}" if _finite(batch, first) else "none: pixels that are not numbers"
        )
        return label, why, torch.empty(0, 1, 1, 3)
    return label, f"to {first.label}, x {gain:g}", difference(batch.images, first.images, gain)


def scaled(image: Tensor, width: int, height: int) -> Image.Image:
    pixels = (255 * image[..., :3].float().nan_to_num(0).clamp(0, 1)).round().byte().cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def fit_text(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """The text, shortened to fit into `width` pixels."""
    letters = font(size, text)
    while len(text) > 1 and draw.textlength(text, letters) > width:
        text = text[:-2] + "…"
    return text


def _draw_histogram(draw: ImageDraw.ImageDraw, batches: Sequence[Batch], top: int, width: int) -> None:
    """Share of pixels over brightness, square root: a line per batch."""
    left, right, bottom, top = GAP + 4, width - GAP - 4, top + HISTOGRAM - 24, top + 22
    shares = [histogram(batch.images) for batch in batches]
    peak = max(*(float(share.max()) for share in shares), 1e-9)
    draw.text((left, top - 20), "brightness of all pixels (square root of their share)", INK, font(13))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * (right - left)
        draw.line((x, top, x, bottom), FAINT)
        draw.text(
            (x, bottom + 4), f"{tick:.0%}", INK, font(13), anchor="la" if tick == 0 else "ra" if tick == 1 else "ma"
        )
    draw.line((left, bottom, right, bottom), INK)
    for i, share in enumerate(shares):
        heights = (share / peak).sqrt().tolist()
        points = [
            (left + (k + 0.5) / BINS * (right - left), bottom - h * (bottom - top)) for k, h in enumerate(heights)
        ]
        draw.line(points, COLOURS[i % len(COLOURS)], 2, joint="curve")


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


CARD_SIDE, CARD_SPACE, CARD_LINE = 300, 24, 26  # of the two pictures, between parts, of a line of text


def draw_card(profile: Calibration, facts: Sequence[str], pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """The profile's name and facts above, its levels on the left, the pictures with their names on the right."""
    long = Curve(f"{profile.steps} steps of {profile.solver}", profile.sigmas)
    plot = draw_schedules([long, *(Curve(f"{one.run.steps} steps", one.run.sigmas) for one in profile.runs[:4])])
    top = 2 * CARD_SPACE + CARD_LINE * (len(facts) + 2)
    height = top + max(plot.height, len(pictures) * (CARD_SIDE + CARD_LINE + CARD_SPACE))
    card, draw = sheet(plot.width + CARD_SIDE + 2 * CARD_SPACE, height)
    draw.text((CARD_SPACE, CARD_SPACE), profile.name, INK, font(22, profile.name))
    for i, fact in enumerate(facts):
        draw.text((CARD_SPACE, CARD_SPACE + CARD_LINE * (i + 1.5)), fact, INK, font(16, fact))
    card.paste(plot, (0, top))
    for i, (name, picture) in enumerate(pictures):
        y, scale = top + i * (CARD_SIDE + CARD_LINE + CARD_SPACE), CARD_SIDE / max(picture.size)
        size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
        draw.text((plot.width + CARD_SPACE, y), name, INK, font(16, name))
        card.paste(picture.resize(size, Image.Resampling.BICUBIC), (plot.width + CARD_SPACE, y + CARD_LINE))
    return card
