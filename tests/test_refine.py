"""Starts from a picture: the published levels, and the signal that is left, against a measured spectrum."""

from __future__ import annotations

import math

import pytest
import torch

from pack.kernels.refine import (
    at_ratio,
    crossing,
    hir_diff,
    kept_up_to,
    power_per_mode,
    ratio,
    resfusion,
    resshift,
    signal_to_noise,
)
from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")


def test_the_clean_picture_cancels_at_the_crossing():
    clean, degraded = torch.tensor(0.7).double(), torch.tensor(-0.4).double()
    alpha = 1 / math.sqrt(1 + crossing(VE) ** 2)  # of a variance-preserving state
    assert alpha == pytest.approx(0.5)
    assert float(alpha * clean + (1 - alpha) * (degraded - clean)) == pytest.approx(0.5 * float(degraded))
    assert float(at_ratio(VE, torch.tensor([crossing(VE)]))) == pytest.approx(math.sqrt(3))
    assert float(at_ratio(FLOW, torch.tensor([crossing(FLOW)]))) == pytest.approx(0.5)


def test_resshifts_levels_are_the_published_ones():
    want = [1.98, 1.817, 1.660, 1.508, 1.361, 1.220, 1.083, 0.952, 0.825, 0.702, 0.583, 0.467, 0.353, 0.234, 0.040, 0]
    assert resshift(15).tolist() == pytest.approx(want, abs=6e-4)
    assert resshift(4).tolist() == pytest.approx([1.98, 1.523, 1.040, 0.200, 0], abs=6e-4)


def test_hir_diff_takes_one_giant_step_and_then_fine_ones():
    levels = hir_diff(20, 14.6).tolist()
    assert levels[:4] == pytest.approx([14.6, 1.42, 0.90, 0.65], abs=6e-3)
    assert levels[-2] == pytest.approx(0.013, abs=6e-4) and levels[-1] == 0


@pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 4, 9, 15, 30])
def test_every_number_of_steps_falls_to_zero(space, steps):
    for ratios in (resfusion(steps, space, 0.03), resshift(steps), hir_diff(steps, 14.6)):
        levels = at_ratio(space, ratios)
        assert len(levels) == steps + 1 and levels[-1] == 0 and (levels.diff() < 0).all()
        torch.testing.assert_close(ratio(space, levels), ratios)


def test_what_is_kept_is_where_a_pictures_spectrum_meets_the_noises():
    """A picture of 1/f amplitude and unit variance, made and measured; white noise of ratio r has r^2 at each frequency."""
    side, r = 64, 0.7
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    spectrum = torch.where(radius > 0, 1 / radius.clamp(min=1), 0.0)
    phases = torch.fft.fft2(torch.randn(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    picture = torch.fft.ifft2(spectrum * phases / phases.abs()).real
    picture = picture / picture.square().mean().sqrt()
    power = torch.fft.fft2(picture).abs().square() / side**2
    ring = (radius - 5).abs() < 0.5
    assert float(power[ring].mean() / r**2) == pytest.approx(signal_to_noise(r, side)(5.0), rel=0.06)
    assert signal_to_noise(r, side)(kept_up_to(r, side)) == pytest.approx(1)
    assert float(power.sum() / (side * side - 1)) == pytest.approx(1, rel=1e-3)
    assert power_per_mode(side) > 1
