"""The yardsticks of the exact tier, against closed forms."""

from __future__ import annotations

import pytest
import torch

from analytic import Mixture
from exact import SIDE, cdf, field, mixture, pivot, quantiles, stratified, wasserstein
from pack.kernels.space import NoiseSpace

VE = NoiseSpace("ve")


def normal(mean: float, std: float) -> Mixture:
    values = (torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[mean]], [std]))
    return Mixture(*values, VE)


def test_wasserstein_between_two_gaussians_is_their_difference_in_mean_and_spread():
    samples = quantiles(normal(1, 2), (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    assert wasserstein(samples, normal(1, 2)) == pytest.approx(0, abs=1e-9)
    assert wasserstein(samples, normal(4, 2)) == pytest.approx(3, abs=1e-9)
    assert wasserstein(samples, normal(1, 6)) == pytest.approx(4, rel=2e-3)  # the last 1/4096 of the tails is missing


@pytest.mark.parametrize("space", ["ve", "flow"])
def test_quantiles_invert_the_distribution_function_and_the_data_are_standardised(space):
    target, p = mixture(space), torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    assert torch.allclose(cdf(target, quantiles(target, p), torch.zeros(())), p, atol=1e-12)
    every = quantiles(target, (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
    assert float(every.mean()) == pytest.approx(0, abs=1e-4) and float(every.std()) == pytest.approx(1, abs=1e-3)
    assert float(field(space).stds().square().mean()) == pytest.approx(1) and field(space).side == SIDE


def test_stratified_noise_has_one_draw_in_each_slice_and_another_order_for_another_seed():
    a, b = stratified(1024, 0), stratified(1024, 1)
    slices = (torch.special.ndtr(a.double().sort().values) * 1024).floor()
    assert torch.equal(slices, torch.arange(1024, dtype=torch.float64))
    assert abs(float((a * b).mean())) < 0.15 and not torch.equal(a, b)


def test_the_best_schedule_of_each_solver_and_step_count_is_marked():
    rows = [
        {"solver": s, "schedule": n, "steps": 5, "kl": v, "se": 0.01}
        for s, n, v in (("euler", "a", 2.0), ("euler", "b", 1.0), ("heun", "a", 0.5), ("heun", "b", 0.75))
    ]
    table = pivot("", rows, [5], "kl", "", "se")
    assert [row[2] for row in table.rows] == ["2 ± 0.01", "**1 ± 0.01**", "**0.5 ± 0.01**", "0.75 ± 0.01"]
