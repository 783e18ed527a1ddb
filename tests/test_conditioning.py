"""Conditioning maps: exact at the knots and at the ends, monotone everywhere, composable in any order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pack.kernels.conditioning import ConditioningMap, compose
from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
SPACES = pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])
DENSE = {
    VE: torch.cat([torch.zeros(1), torch.logspace(-5, 4, 4001, dtype=torch.float64)]).double(),
    FLOW: torch.cat([torch.zeros(1), torch.linspace(-14, 14, 4001, dtype=torch.float64).sigmoid(), torch.ones(1)]),
}


def odds(space, sigma):
    return sigma if space == VE else sigma / (1 - sigma)


def random_map(space, seed, strength=1.0, knots=None):
    """Knots anywhere in the model's range, ratios up to 8 either way, as bad a fit as is accepted."""
    rng = np.random.default_rng(seed)
    n = knots or rng.integers(1, 12)
    low = np.sort(rng.uniform(-4, 4, n)) + 0.01 * np.arange(n)
    high = low + rng.uniform(-2.07, 2.07, n)
    level = np.exp if space == VE else lambda l: 1 / (1 + np.exp(-l))
    return ConditioningMap.through(space, level(low).tolist(), level(high).tolist(), strength)


@SPACES
def test_it_passes_through_its_knots(space):
    sigma, sigma_cond = [0.05, 0.2, 0.5, 0.9], [0.04, 0.1, 0.45, 0.85]
    out = ConditioningMap.through(space, sigma, sigma_cond)(torch.tensor(sigma, dtype=torch.float64))
    np.testing.assert_allclose(out, sigma_cond, rtol=1e-14)


@SPACES
def test_between_knots_it_is_numpys_interpolation_of_the_logarithms(space):
    """An independent implementation, the fade included."""
    sigma, sigma_cond = np.array([0.05, 0.2, 0.5]), np.array([0.04, 0.1, 0.45])
    low = np.log(odds(space, sigma))
    offset = np.log(odds(space, sigma_cond)) - low
    at = DENSE[space][1:-1].numpy()
    log_odds = np.log(odds(space, at))
    widths = np.maximum(1, 2 * np.abs(offset[[0, -1]]))
    want = np.interp(log_odds, [low[0] - widths[0], *low, low[-1] + widths[1]], [0, *offset, 0])
    got = ConditioningMap.through(space, sigma.tolist(), sigma_cond.tolist())(torch.from_numpy(at)).numpy()
    np.testing.assert_allclose(np.log(odds(space, got)) - log_odds, want, rtol=0, atol=1e-9)


@SPACES
@pytest.mark.parametrize("seed", range(40))
def test_any_accepted_map_is_monotone_and_the_identity_outside_its_fade(space, seed):
    a_map, sigma = random_map(space, seed), DENSE[space]
    out = a_map(sigma)
    assert torch.isfinite(out).all()
    assert (out.diff() >= -1e-12 * out[1:]).all()
    far = (space.log_ratio(sigma) <= a_map.at[0]) | (space.log_ratio(sigma) >= a_map.at[-1])
    assert far.sum() > 2 and torch.equal(out[far], sigma[far])


@SPACES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_ends_of_the_range_map_to_themselves_exactly(space, dtype):
    ends = torch.tensor([0.0] if space == VE else [0.0, 1.0], dtype=dtype)
    for seed in range(10):
        assert torch.equal(random_map(space, seed)(ends), ends)


@SPACES
def test_strength_zero_returns_the_very_same_tensor(space):
    sigma = DENSE[space]
    assert random_map(space, 1, strength=0.0)(sigma) is sigma
    same = ConditioningMap.through(space, [0.1, 0.5], [0.1, 0.5])
    assert same.is_identity and same(sigma) is sigma


@SPACES
def test_strength_scales_the_offset_in_log(space):
    whole, half = random_map(space, 3), random_map(space, 3, strength=0.5)
    sigma = DENSE[space][500:3500]
    log_ratio = space.log_ratio(sigma)
    shift = lambda a_map: space.log_ratio(a_map(sigma)) - log_ratio
    torch.testing.assert_close(shift(half), shift(whole) / 2, rtol=1e-6, atol=1e-9)


@SPACES
def test_maps_compose_by_adding_offsets_in_any_order_to_the_bit(space):
    maps = [random_map(space, seed, strength=0.3) for seed in (5, 6, 7)]
    sigma = DENSE[space]
    results = [compose(order) for order in itertools.permutations(maps)]
    assert len({(r.at, r.offset) for r in results}) == 1
    assert len({tuple(result(sigma).tolist()) for result in results}) == 1


@SPACES
@pytest.mark.parametrize("seed", range(10))
def test_a_composition_is_monotone_and_ends_as_the_identity(space, seed):
    out = compose([random_map(space, seed), random_map(space, seed + 100)])(DENSE[space])
    assert (out.diff() >= -1e-12 * out[1:]).all()
    assert float(out[0]) == 0 and float(out[-1]) == float(DENSE[space][-1])


def test_two_gentle_maps_add_exactly():
    a = ConditioningMap.through(VE, [0.1, 1.0, 10.0], [0.09, 0.8, 9.5])
    b = ConditioningMap.through(VE, [0.3, 3.0], [0.33, 3.6])
    sigma = DENSE[VE][1:]
    want = a(sigma).log() + b(sigma).log() - sigma.log()
    torch.testing.assert_close(compose([a, b])(sigma).log(), want, rtol=0, atol=1e-12)


@SPACES
def test_composing_with_the_identity_or_nothing_else_changes_no_bit(space):
    a_map, sigma = random_map(space, 4), DENSE[space]
    assert torch.equal(compose([a_map])(sigma), a_map(sigma))
    identity = random_map(space, 5, strength=0.0)
    assert compose([identity, a_map]) is a_map and compose([a_map, identity]) is a_map
    assert compose([identity, identity]).is_identity


def test_shape_dtype_and_device_of_the_levels_are_kept():
    a_map = random_map(VE, 2)
    for shape in [(), (1,), (3,), (2, 1, 1)]:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            out = a_map(torch.full(shape, 0.7, dtype=dtype))
            assert out.shape == shape and out.dtype == dtype


def test_levels_in_a_batch_are_mapped_one_by_one():
    a_map, sigma = random_map(VE, 2), DENSE[VE][::100]
    torch.testing.assert_close(torch.stack([a_map(s) for s in sigma]), a_map(sigma), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("space", "sigma", "sigma_cond", "strength", "words"),
    [
        (VE, [1.0, 0.5], [1.0, 0.5], 1.0, r"must ascend, but sigma\[0\] = 1 is followed by 0.5"),
        (VE, [0.5, 0.5], [0.5, 0.5], 1.0, "must ascend"),
        (VE, [1.0], [8.1], 1.0, "ratio beyond 8"),
        (VE, [1.0], [0.12], 1.0, "ratio beyond 8"),
        (FLOW, [0.5], [0.9], 1.0, "ratio beyond 8"),
        (FLOW, [0.5, 1.0], [0.5, 1.0], 1.0, r"between 0 and 1, ends excluded, but sigma\[1\] = 1"),
        (VE, [0.0, 1.0], [0.0, 1.0], 1.0, r"sigma\[0\] = 0"),
        (VE, [math.nan], [1.0], 1.0, r"sigma\[0\] = nan"),
        (VE, [1.0], [math.inf], 1.0, r"sigma_cond\[0\] = inf"),
        (VE, [1.0], [1.0, 2.0], 1.0, "there are 2 and 1"),
        (VE, [], [], 1.0, "there are 0 and 0"),
        (VE, [1.0], [1.0], 1.5, "from 0 to 1, but it is 1.5"),
        (VE, [1.0], [1.0], math.nan, "from 0 to 1"),
    ],
)
def test_what_is_no_calibration_is_refused(space, sigma, sigma_cond, strength, words):
    with pytest.raises(ValueError, match=words):
        ConditioningMap.through(space, sigma, sigma_cond, strength)


def test_a_ratio_of_eight_is_still_accepted_and_reached():
    assert float(ConditioningMap.through(VE, [1.0], [8.0])(torch.tensor(1.0))) == pytest.approx(8)


def test_maps_of_different_spaces_do_not_compose():
    with pytest.raises(ValueError, match="one noise space"):
        compose([random_map(VE, 0), random_map(FLOW, 0)])
