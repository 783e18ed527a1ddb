"""Drafts: which one is picked, and how the sheet is laid out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pack.nodes._draw.sheets import LABEL, draw_contact_sheet
from pack.nodes._plan.draft_seeds import Drafts, picked

DRAFTS = Drafts((7, 8, 9))


@pytest.mark.parametrize(
    ("scores", "index"),
    [
        ([0.1, 0.9, 0.3], 1),
        ([[0.1], [0.2], [0.3]], 2),  # as a list of outputs gives them
        ([torch.tensor([3.0, 1.0, 2.0])], 0),
        (["0.5, 0.5\n0.1"], 0),  # the first of equals
        ([np.float32(1), np.float32(2), True], 1),
        (None, None),
    ],
)
def test_the_highest_score_wins(scores, index):
    assert picked(DRAFTS, 0, scores) == index


def test_a_number_wins_over_scores():
    assert picked(DRAFTS, 2, [9.0, 1.0, 1.0]) == 1


@pytest.mark.parametrize(
    ("number", "scores", "said"),
    [
        (4, None, "'number' is 4, but there are 3 drafts: choose one of 1 to 3"),
        (0, [1.0, 2.0], "for each of the 3 drafts, but it holds 2 finite"),
        (0, [1.0, 2.0, float("nan")], "but it holds some that are not finite"),
        (0, ["a cat"], "but it holds the text 'a'"),
        (0, [{}], "but it holds a dict"),
    ],
)
def test_what_picks_nothing_is_said(number, scores, said):
    with pytest.raises(ValueError, match=said):
        picked(DRAFTS, number, scores)


def test_every_picture_stands_on_the_sheet_under_its_label():
    images = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 6, 12, 3)
    sheet = np.asarray(draw_contact_sheet(images, [str(i) for i in range(5)], 24)).astype(int)
    assert sheet.shape == (2 * (LABEL + 12 + 8) + 8, 3 * (24 + 8) + 8, 3)
    for i, grey in enumerate(torch.linspace(0.1, 0.9, 5).tolist()):
        x, y = 8 + i % 3 * 32, 8 + i // 3 * (LABEL + 12 + 8)
        assert (abs(sheet[y + LABEL : y + LABEL + 12, x : x + 24] - 255 * grey) <= 1).all()
        assert sheet[y : y + LABEL, x : x + 24].min() < 200  # its label
