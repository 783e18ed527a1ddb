"""Plots of schedules: what is drawn where, and that odd input is drawn, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pack.kernels.propagation import Reuse
from pack.models.calibration import Calibration, CondLevels, Point
from pack.models.store import shipped_profiles
from pack.nodes._draw.axes import BOTTOM, COLOURS, HEIGHT, INK, LEFT, PAPER, RIGHT, TOP, WIDTH, Axes, sheet, to_image
from pack.nodes._draw.plots import (
    CURVE,
    KEY_STEP,
    SECOND_ALONE,
    Curve,
    draw_calibration,
    draw_schedules,
    draw_speeds,
    profile_curve,
)


def where(picture, colour, left=LEFT, right=WIDTH - RIGHT):
    """Rows and columns, from `left`, of the pixels of exactly that colour."""
    return np.argwhere((np.asarray(picture)[:, left:right] == colour).all(-1))


def test_the_levels_lie_on_a_logarithmic_axis():
    """Three decades in equal steps: the dots are equally far apart in both directions."""
    picture = draw_schedules([Curve("", (10.0, 1.0, 0.1, 0.01))])
    xs = np.linspace(LEFT, WIDTH - RIGHT, 4)
    rows = []
    for x in xs:
        near = where(picture, COLOURS[0], int(x) - 3, int(x) + 4)
        near = near[near[:, 0] > TOP + 20] if x > WIDTH / 2 else near
        rows.append(near[:, 0].mean())
    assert np.ptp(np.diff(rows)) < 8 and (np.diff(rows) > 60).all()


def test_a_final_zero_is_on_the_baseline():
    picture = draw_schedules([Curve("", (1.0, 0.5, 0.0))])
    assert where(picture, COLOURS[0])[:, 0].max() >= HEIGHT - BOTTOM


def test_each_curve_has_its_colour_and_dashes_show_what_is_told():
    curves = [Curve(str(i), (10.0 - i, 1.0, 0.0)) for i in range(4)]
    counts = [len(where(draw_schedules(curves), colour)) for colour in COLOURS]
    assert min(counts[:4]) > 200 and counts[4] == 0
    plain, told = (draw_schedules([Curve("", (10.0, 1.0, 0.1), told)]) for told in (None, (8.0, 0.6, 0.1)))
    assert len(where(told, COLOURS[0])) > len(where(plain, COLOURS[0])) + 200


def test_ink_on_paper_and_curves_are_readable_in_every_theme():
    """Contrast of WCAG 2: 4.5 for text, 3 for graphics, on the plot's own paper."""

    def luminance(colour):
        parts = np.array(colour) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    contrast = lambda colour: (luminance(PAPER) + 0.05) / (luminance(colour) + 0.05)
    assert contrast(INK) > 4.5 and min(map(contrast, COLOURS)) > 3


@pytest.mark.parametrize(
    "sigmas", [(), (0.0,), (1.0,), (1.0, 0.0), (1.0, 1.0), (1e-9, 0.0), (700.0, 0.002, 0.0), tuple(range(5000, -1, -1)), (float("inf"), 1.0)]
)  # fmt: skip
def test_any_list_of_levels_is_drawn(sigmas):
    image = to_image(draw_schedules([Curve("x" * 200, sigmas)]))
    assert image.shape == (1, HEIGHT, WIDTH, 3) and image.dtype == torch.float32
    assert 0 <= float(image.min()) < 0.3 and float(image.max()) <= 1


def test_no_curve_at_all_says_so():
    assert len(where(draw_schedules([]), INK)) > 100


def test_a_profile_shows_what_its_alignment_tells():
    aligned = CondLevels("euler", (8, 8), (0.5, 2.0), (0.4, 2.2))
    profile = Calibration("p", "m", "ve", ("SD15",), (8, 8), (10.0, 2.0, 0.5, 0.0), "s", alignments=(aligned,))
    curve = profile_curve(profile)
    assert curve.sigmas == profile.sigmas
    np.testing.assert_allclose(curve.told, (10.0, 2.2, 0.4, 0.0), rtol=1e-12)
    published = profile_curve(shipped_profiles()["AYS SDXL"])
    assert published.told is None and published.sigmas[-1] == 0  # as it runs


def test_a_noise_shift_shows_its_knots():
    aligned = CondLevels("", (8, 8), (0.2, 0.5), (0.25, 0.6))
    profile = Calibration("p", "m", "flow", ("SD3",), (8, 8), (), "s", kind="noise_shift", alignments=(aligned,))
    assert profile_curve(profile).sigmas == (0.5, 0.2)


CHANGES = {"input 1": [0.5, 0.2, 0.1, 0.05], "middle": [0.3, 0.1, 0.05, 0.0]}
POINTS = (Point(Reuse(1, 8, True), (0, 2, 4), 1.5, 52.0), Point(Reuse(1, 8, True), (0, 4), 2.5, 41.0))


def test_a_calibration_marks_its_key_steps_and_rings_the_chosen_setting():
    pictures = [draw_calibration(CHANGES, 5, POINTS, chosen) for chosen in POINTS]
    three, two = (len(np.unique(where(one, KEY_STEP, 0, 700)[:, 1])) for one in pictures)
    assert three > two > 0
    rings = [where(one, INK, *CURVE[::2]) for one in pictures]
    middles = [ring[(ring[:, 0] > 70) & (ring[:, 0] < 390) & (ring[:, 1] > 10)].mean(axis=0) for ring in rings]
    assert middles[1][1] > middles[0][1] + 50 and middles[1][0] > middles[0][0] + 50  # faster, and lower


def test_the_curve_alone_is_the_one_of_the_calibration():
    whole, alone = draw_calibration(CHANGES, 5, POINTS, POINTS[1]), draw_speeds(POINTS, POINTS[1])
    left, top, right, bottom = SECOND_ALONE
    shift = CURVE[0] - left
    assert alone.crop((left, top, right, bottom)) == whole.crop((left + shift, top, right + shift, bottom))


@pytest.mark.parametrize("changes", [{}, {"one": []}, {"one": [0.0, 0.0]}, {"x" * 99: [1e-12, 1e9]}])
@pytest.mark.parametrize("steps", [1, 2, 300])
def test_any_calibration_is_drawn(changes, steps):
    lonely = Point(Reuse(1, 8, True), (0,), 1.0, 0.0)
    assert draw_calibration(changes, steps, (lonely,), lonely).size == (1280, 480)


def test_points_beyond_the_axes_are_drawn_on_their_edge():
    axes = Axes(sheet()[1], (0, 2), (-1, 1), (100, 50, 300, 150))
    assert axes.at(1, 0) == (200, 100) and axes.at(0, -1) == (100, 150)
    assert axes.at(9, float("inf")) == (300, 50)
