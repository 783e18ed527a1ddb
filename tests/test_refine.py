"""Starts from a picture: the published levels, and the signal that is left, against a measured spectrum."""

from __future__ import annotations

import math
from itertools import pairwise

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
    start_for_detail,
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


@pytest.mark.parametrize(("space", "finest"), [(VE, 2), (FLOW, 6)], ids=["ve", "flow"])
def test_no_start_mends_a_gaussian_picture_better_than_the_one_for_its_lost_detail(space, finest):
    """Pictures of 1/f amplitude without what is finer than half a cycle to `finest` pixels, and runs from them by Euler
    on the exact denoiser: what was kept is compared with the picture, what is drawn with the spread that belongs there.
    """
    side, generator = 32, torch.Generator().manual_seed(0)
    f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    stds = torch.where(radius > 0, (power_per_mode(side) ** 0.5 / radius.clamp(min=1)), 0.0)
    kept = radius <= side / (2 * finest)
    white, noise = torch.fft.fft2(torch.randn(2, 32, side, side, dtype=torch.float64, generator=generator)) / side
    clean = white * stds

    def cost(r: float) -> float:
        levels = at_ratio(space, torch.cat([torch.logspace(math.log10(r), -2.5, 40), torch.zeros(1)]).double())
        x = space.alpha(levels[0]) * clean * kept + levels[0] * noise
        for sigma, sigma_next in pairwise(levels):
            alpha = space.alpha(sigma)
            denoised = alpha * stds**2 / (alpha**2 * stds**2 + sigma**2) * x
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
        moved = (x - clean).abs().square().mean(0)
        spread = (x.abs().square().mean(0).sqrt() - clean.abs().square().mean(0).sqrt()).square()
        return float(torch.where(kept, moved, spread).sum())

    start = start_for_detail(finest, side)
    tried = [cost(start * 2 ** (i / 2)) for i in range(-4, 5)]
    assert cost(start) <= 1.05 * min(tried) and min(tried[0], tried[-1]) > 1.3 * cost(start)
