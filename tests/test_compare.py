"""Pictures side by side: the numbers under them, the differences, the histogram, and where everything lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pack.nodes._draw import axes
from pack.nodes._draw.axes import COLOURS
from pack.nodes._draw.sheets import (
    BINS,
    GAP,
    HEAD,
    HISTOGRAM,
    Batch,
    brightness,
    difference,
    draw_comparison,
    histogram,
    psnr,
)


def grey(value: float, count: int = 1, size: int = 32) -> torch.Tensor:
    return torch.full((count, size, size, 3), value)


def test_psnr_and_brightness_of_known_pictures():
    assert psnr(grey(0.5), grey(0.6)) == pytest.approx(20)
    assert math.isinf(psnr(grey(0.3), grey(0.3)))
    assert float(brightness(torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx(0.7152)
    assert float(brightness(torch.ones(2, 2, 4)).mean()) == pytest.approx(1)  # the alpha of RGBA pictures is no light


def test_the_difference_is_the_largest_over_the_colours_from_black_to_white():
    a, b = torch.zeros(3, 3), torch.tensor([[0.0, 0, 0], [0, 0.05, 0.01], [1, 1, 1]])
    expected = torch.tensor([[0, 0, 0], [0.4, 0.2, 0], [1, 1, 1]])
    torch.testing.assert_close(difference(a, b, 4.0), expected)


def test_the_histogram_counts_every_pixel_where_it_belongs():
    half = torch.cat([grey(0.0), grey(0.999)])
    shares = histogram(half)
    assert shares.sum() == pytest.approx(1) and shares[0] == shares[BINS - 1] == pytest.approx(0.5)


@pytest.mark.parametrize(("gain", "shown", "columns"), [(0.0, True, 3), (4.0, True, 5), (4.0, False, 5)])
def test_columns_rows_and_panels(gain, shown, columns):
    batches = [Batch("a", grey(0.2, 3)), Batch("b", grey(0.5, 3)), Batch("c", grey(0.2, 3))]
    picture = draw_comparison(batches, gain, shown, 64, 2)
    assert picture.size == (columns * (64 + GAP) + GAP, HEAD + 2 * (64 + GAP) + (HISTOGRAM + GAP if shown else 0))
    at = lambda column, row: picture.getpixel((GAP + column * (64 + GAP) + 32, HEAD + row * (64 + GAP) + 32))
    assert [at(i, 1) for i in range(3)] == [(51, 51, 51), (128, 128, 128), (51, 51, 51)]
    if gain:
        assert at(3, 0) == (255, 255, 255) and at(4, 0) == (0, 0, 0)


def test_every_batch_has_its_line_in_the_histogram():
    picture = np.asarray(draw_comparison([Batch(str(i), grey(0.1 + 0.2 * i)) for i in range(4)], 0, True, 64, 1))
    panel = picture[HEAD + 64 + GAP + 22 :]
    lines = [np.argwhere((panel == COLOURS[i]).all(-1)) for i in range(4)]
    assert [len(line) > 20 for line in lines] == [True] * 4
    peaks = np.array([line[line[:, 0] == line[:, 0].min()][:, 1].mean() for line in lines])
    left, width = GAP + 4, picture.shape[1] - 2 * (GAP + 4)
    assert np.allclose((peaks - left) / width, [0.1, 0.3, 0.5, 0.7], atol=0.5 / BINS + 0.01)


def texts(monkeypatch, *batches: Batch) -> list[str]:
    from PIL import ImageDraw

    written: list[str] = []
    original = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *a, **k: (written.append(text), original(self, at, text, *a, **k)),
    )
    draw_comparison(batches, 1.0, False, 400, 4)
    return written


def test_equal_pictures_are_called_identical_and_others_have_their_distance(monkeypatch):
    written = texts(monkeypatch, Batch("stock", grey(0.5)), Batch("off", grey(0.5)), Batch("on", grey(0.6)))
    assert "brightness 50.0 %, identical" in written and "brightness 60.0 %, 20.0 dB to stock" in written


def test_one_picture_is_compared_with_all_of_a_batch(monkeypatch):
    written = texts(monkeypatch, Batch("goal", grey(0.5)), Batch("tries", grey(0.6, 3)))
    assert "brightness 60.0 %, 20.0 dB to goal" in written


@pytest.mark.parametrize("other", [grey(0.5, size=16), grey(0.5, 3), torch.rand(1, 48, 32, 3)])
def test_other_sizes_and_numbers_are_shown_without_a_difference(monkeypatch, other):
    written = texts(monkeypatch, Batch("first", grey(0.5, 2)), Batch("other", other))
    assert "other size or number than first" in written


def test_long_labels_are_shortened_to_their_column(monkeypatch):
    picture = draw_comparison([Batch("an endless name " * 9, grey(0.5)), Batch("b", grey(0.5))], 0, False, 64, 1)
    assert picture.size[0] == 2 * (64 + GAP) + GAP


def test_odd_input_is_drawn():
    for images in (
        torch.full((1, 1, 1, 3), 2.0),
        torch.full((1, 1, 700, 3), -1.0),
        grey(0.5).half(),
        torch.rand(2, 8, 8, 4),
    ):
        picture = draw_comparison([Batch("", images), Batch("", images)], 3.0, True, 64, 4)
        assert min(picture.size) > 64


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_no_numbers_are_said_and_neither_compared_nor_counted(monkeypatch, broken):
    bad = grey(0.5)
    bad[0, :8] = broken  # a quarter of the rows
    written = texts(monkeypatch, Batch("stock", grey(0.5)), Batch("bad", bad))
    assert "not numbers: 25 % of the pixels" in written and "none: pixels that are not numbers" in written
    assert not [text for text in written if "nan" in text or "inf" in text]
    assert histogram(bad).sum() == pytest.approx(1) and histogram(bad)[BINS // 2] == pytest.approx(1)
    draw_comparison([Batch("a", torch.full((1, 8, 8, 3), broken))], 1.0, True, 64, 1)


def test_a_grid_that_would_not_fit_is_refused_with_its_size_and_what_fits():
    batches = [Batch("a", grey(0.5, 64)), Batch("b", grey(0.5, 64))]
    with pytest.raises(
        ValueError, match=r"would have 6176 x 131636 pixels; at most 100 million.*'width' to 704 or less"
    ):
        draw_comparison(batches, 1.0, False, 2048, 64)
    assert draw_comparison(batches, 1.0, False, 704, 64).size == (3 * 712 + 8, HEAD + 64 * 712)


def test_labels_are_written_in_a_font_that_has_their_letters(monkeypatch):
    """Pillow's own has no Cyrillic ones; DejaVu, which matplotlib brings, has, and no Chinese ones."""
    matplotlib = pytest.importorskip("matplotlib")
    deja = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    axes.font.cache_clear()
    monkeypatch.setattr(axes, "FONTS", ("of another system.ttc", deja))
    assert axes.font(17, "stock") is axes.font(17, "stock") and axes.font(17, "stock").getname()[0] != "DejaVu Sans"
    assert axes.font(17, "до").getname()[0] == "DejaVu Sans"
    written = texts(monkeypatch, Batch("до", grey(0.5)), Batch("微调后", grey(0.6)))
    axes.font.cache_clear()
    assert "до" in written and "image 2" in written and "image 2: difference" in written


@pytest.mark.parametrize(
    ("text", "names"),
    [("stock, tuned", ["stock", "tuned"]), ("原图，调整后", ["原图", "调整后"]), ("元、後", ["元", "後"]), (" ", [])],
)
def test_labels_lie_between_commas_of_any_keyboard(text, names):
    assert axes.labels_of(text) == names
