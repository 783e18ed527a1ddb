"""The judge's arithmetic against pictures whose answer is known."""

from __future__ import annotations

import pytest
import torch

from judge import BACKGROUNDS, OBJECTS, corner_colours, load_judge, nearest_background


@pytest.fixture(scope="module")
def palette():
    """One plain picture per background, with something else in the middle."""
    pictures = torch.tensor(list(BACKGROUNDS.values())).float()[:, :, None, None].expand(-1, 3, 128, 128) / 255
    pictures = pictures.clone()
    pictures[:, :, 32:96, 32:96] = torch.tensor([0.9, 0.2, 0.6])[:, None, None]
    return pictures


def test_corner_colours_ignore_the_middle(palette):
    torch.testing.assert_close(corner_colours(palette), torch.tensor(list(BACKGROUNDS.values())) / 255)


def test_every_background_is_its_own_nearest(palette):
    assert nearest_background(palette).tolist() == list(range(len(BACKGROUNDS)))


def test_a_corner_that_is_not_background_is_outvoted(palette):
    palette[:, :, :16, :16] = 0.5
    assert nearest_background(palette).tolist() == list(range(len(BACKGROUNDS)))


def test_the_judge_has_a_logit_per_object_and_finite_features():
    features, logits = load_judge()(torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 256) and logits.shape == (2, len(OBJECTS))
    assert torch.isfinite(features).all()


def test_the_judge_sees_shape_and_not_only_colour():
    """A shape that is no object, in an object's colour, is not called that object with confidence."""
    picture = torch.ones(1, 3, 128, 128)
    picture[:, :, 60:68, 8:120] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    share = load_judge()(picture)[1].softmax(dim=1)[0, OBJECTS.index("red apple")]
    assert share < 0.5
