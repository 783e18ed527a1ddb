"""Timestep densities against closed forms, clusters and assignments against all there are, noise against its order
statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pack.kernels import training_noise as kernel
from pack.kernels.space import NoiseSpace
from pack.kernels.training_noise import Levels, TimestepDensity

N = 1000


def flow(n: int = N) -> Levels:
    sigma = 1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return Levels(sigma, sigma, NoiseSpace("flow"))


def ve(n: int = N) -> Levels:
    sigma = torch.logspace(1, -1.5, n, dtype=torch.float64)
    return Levels(sigma, sigma, NoiseSpace("ve"))


def drawn(levels: Levels, count: int = 4000, **settings) -> torch.Tensor:
    """The sigmas of `count` evenly spread u, as a trainer on a flow model gets them: the exact law but for the grid."""
    place = kernel.quantile(kernel.stages(TimestepDensity(**settings), levels)[-1])
    return torch.tensor([1 - place((i + 0.5) / count) for i in range(count)], dtype=torch.float64)


def test_a_uniform_density_gives_u_back():
    place = kernel.quantile(torch.ones(N))
    assert [place(u) for u in (0.0, 0.25, 0.9, 1.0)] == pytest.approx([0, 0.25, 0.9, 1])


def test_logit_normal_draws_are_normal_after_logit():
    z = torch.logit(drawn(flow(), kind="logit-normal", mean=0.5, spread=0.8))
    assert float(z.mean()) == pytest.approx(0.5, abs=2e-3) and float(z.std()) == pytest.approx(0.8, rel=3e-3)


def test_mode_draws_are_its_quantile_function():
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    torch.testing.assert_close(drawn(flow(), kind="mode"), kernel.mode_quantile(u, 1.29), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"from -1 to 1.752, but it is 2"):
        kernel.mode_shares(10, 2.0)


@pytest.mark.parametrize("levels", [flow(), ve()], ids=["flow", "ve"])
def test_a_flat_prediction_weighs_every_level_of_the_networks_own_error_alike(levels):
    (shares,) = kernel.stages(TimestepDensity("flat prediction"), levels)
    weight = shares * levels.gain**2
    above = levels.gain >= kernel.LOWEST_GAIN
    torch.testing.assert_close(weight[above], weight[0].expand(int(above.sum())))
    assert (weight[~above] < weight[0]).all()


def test_min_snr_weighs_clean_pictures_by_the_limited_signal_to_noise_ratio():
    levels = flow()
    (shares,) = kernel.stages(TimestepDensity("min-SNR", gamma=5), levels)
    snr = ((1 - levels.sigma) / levels.sigma) ** 2
    torch.testing.assert_close(shares / shares[-1], snr.clamp(max=5) / 5)


def test_a_band_draws_nothing_outside_and_says_where_there_is_nothing():
    sigma = drawn(flow(), highest=0.9, lowest=0.4)
    assert 0.4 <= float(sigma.min()) < 0.402 and 0.898 < float(sigma.max()) <= 0.9
    within = drawn(flow(), kind="logit-normal", highest=0.9, lowest=0.4)
    assert float(within.min()) >= 0.4 and float(within.max()) <= 0.9
    with pytest.raises(ValueError, match=r"lies between 2 and 3: its levels go from 0.0005 to 1"):
        kernel.stages(TimestepDensity(highest=3.0, lowest=2.0), flow())


def test_clusters_are_the_best_of_all_and_are_drawn_equally():
    values = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.1, 5.0, 5.5, 9.0], dtype=torch.float64)

    def cost(ends) -> float:
        parts = [values[a:b] for a, b in itertools.pairwise([0, *ends])]
        return sum(float((part - part[(len(part) - 1) // 2]).abs().sum()) for part in parts)

    for count in (1, 2, 3, 4, 8):
        every = [(*cuts, 8) for cuts in itertools.combinations(range(1, 8), count - 1)]
        assert cost(kernel.cluster_ends(values, count)) == pytest.approx(min(map(cost, every)))
    (shares,) = kernel.stages(TimestepDensity("clusters", clusters=5), ve())
    ends = kernel.cluster_ends(ve().half_log_snr, 5)
    parts = [float(shares[a:b].sum()) for a, b in itertools.pairwise([0, *ends])]
    assert parts == pytest.approx([0.2] * 5)


def test_a_curriculum_opens_from_the_noisy_end_and_has_all_levels_from_half_on():
    found = kernel.stages(TimestepDensity("curriculum", clusters=4, planned=100), flow())
    reach = [int((shares > 0).nonzero()[-1]) for shares in found]
    assert len(found) == 4 and reach == sorted(reach) and reach[-1] == N - 1
    assert all(float(shares[0]) > 0 and len(shares[shares > 0].unique()) == 1 for shares in found)
    assert [kernel.stage_now(done, 100, 4) for done in (0, 16, 17, 34, 49, 50, 99, 500)] == [0, 0, 1, 2, 2, 3, 3, 3]


def test_a_band_of_clusters_has_its_own():
    (shares,) = kernel.stages(TimestepDensity("clusters", clusters=3, highest=0.9, lowest=0.5), flow())
    inside = (flow().sigma >= 0.5) & (flow().sigma <= 0.9)
    assert float(shares[~inside].abs().sum()) == 0 and (shares[inside] > 0).all()
    assert len(shares[inside].unique()) == 3


def test_an_assignment_is_the_best_of_all_and_that_of_scipy():
    from scipy.optimize import linear_sum_assignment

    torch.manual_seed(0)
    for n in (1, 2, 5):
        cost = torch.randn(n, n)
        best = min(sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(n)))
        found = kernel.assignment(cost)
        assert sorted(found) == list(range(n))
        assert sum(float(cost[i, j]) for i, j in enumerate(found)) == pytest.approx(best)
    cost = torch.rand(48, 48)
    assert kernel.assignment(cost) == linear_sum_assignment(cost.numpy())[1].tolist()


def test_assigned_noise_is_the_batchs_own_in_another_order():
    torch.manual_seed(1)
    noise, order = torch.randn(6, 4, 3, 3), torch.tensor([4, 2, 5, 0, 1, 3])
    torch.testing.assert_close(kernel.assign(noise[order], noise), noise[order])


def test_the_nearest_of_four_draws_leans_to_the_picture_as_the_greatest_of_four_normals():
    """Along the picture the mean is 1.0294, that of the greatest of 4 normals (Pearson 1931), across it 0."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.zeros(4000, 2, 5)
    latent[:, 0, 0] = 30.0  # far enough for the distance to be that along it
    draw = lambda: torch.randn(latent.shape, generator=generator)
    near = kernel.nearest(latent, draw(), 4, draw)
    assert float(near[:, 0, 0].mean()) == pytest.approx(1.0294, abs=3 * 0.7 / math.sqrt(4000))
    assert float(near[:, 1].mean()) == pytest.approx(0, abs=4 / math.sqrt(20000))
    assert float(near[:, 1].std()) == pytest.approx(1, abs=0.02)


def test_one_draw_is_the_trainers_own():
    noise = torch.randn(2, 4, 3, 3)
    assert kernel.nearest(noise, noise, 1, lambda: pytest.fail("drew")) is noise
