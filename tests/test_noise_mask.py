"""Noise masks: UPSR's law by hand, holes, and the host's own threshold at the levels that the mask stands for."""

from __future__ import annotations

import pytest
import torch

from pack.kernels.noise_mask import edges, of_holes, time_share, uncertainty, with_floor
from pack.kernels.space import NoiseSpace


def test_upsrs_law():
    """In their pictures of -1..1: u = clip(|A - B| / 2, 0, .1) / .1, w = .4 + .6 u."""
    a, b = torch.rand(2, 1, 6, 6, 1, generator=torch.Generator().manual_seed(0)) * 0.3
    want = 0.4 + 0.6 * ((2 * a - 2 * b).abs() / 2).clamp(0, 0.1) / 0.1
    torch.testing.assert_close(with_floor(uncertainty(a, b), 0.4), want[..., 0])


def test_edges_are_where_a_smaller_picture_is_another():
    picture = torch.zeros(1, 32, 32, 3)
    picture[:, :, 14:] = 1
    found = edges(picture)[0]
    assert float(found[:, 11:17].max()) == 1 and float(found[:, :8].max()) < 0.05 and float(found[:, 24:].max()) < 0.05


def test_holes_get_all_and_the_rest_a_part():
    holes = torch.zeros(1, 21, 21)
    holes[:, 8:13, 8:13] = 1
    hard, soft = of_holes(holes, 0.45)[0], of_holes(holes, 0.45, 4)[0]
    torch.testing.assert_close(hard, 0.45 + 0.55 * holes[0])
    assert float(soft[10, 10]) == 1 and float(soft[0, 0]) == pytest.approx(0.45)
    row = soft[10, :11]
    assert (row.diff() >= -1e-6).all() and float(row[3]) < 0.4501 < float(row[5]) < 1


@pytest.mark.parametrize("space", ["ve", "flow"])
def test_a_pixel_joins_where_the_noise_has_fallen_to_its_share(space):
    """The mask's value is the host's threshold at the level of w times the noise over signal."""
    space = NoiseSpace(space)
    times = (lambda s: s.log() + 4) if space.kind == "ve" else (lambda s: 1000 * s)
    start, end = (2.0, 0.03) if space.kind == "ve" else (0.7, 0.003)
    for share in (0.3, 0.6):
        level = share * start if space.kind == "ve" else share * start / (1 - start + share * start)
        t, top, low = (float(times(torch.tensor(s))) for s in (level, start, end))
        got = time_share(torch.tensor([[share]]), start, end, space, times)
        assert float(got) == pytest.approx((t - low) / (top - low), rel=1e-4)
    ends = time_share(torch.tensor([0.0, 1.0]), start, end, space, times)
    assert ends.tolist() == [0, 1]
