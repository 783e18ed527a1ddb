"""The KL-optimal schedule, against exact Gaussian targets: Euler's output spread is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from oracles import end_std, gaussian
from pack.kernels.ays import kl_optimal
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
SPACES = pytest.mark.parametrize(("space", "first"), [(VE, 14.6146), (FLOW, 1.0)], ids=["ve", "flow"])


@SPACES
@pytest.mark.parametrize("c", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 20])
def test_each_step_multiplies_the_spread_by_the_cosine_of_its_angle(space, first, c, steps):
    sigmas = kl_optimal(steps, first, space, c)
    angle = float(space.angle(torch.tensor(first, dtype=torch.float64), c))
    want = c * math.cos(angle / steps) ** steps
    assert end_std(gaussian(c, space), sigmas) == pytest.approx(want, rel=1e-9, abs=1e-12)


@SPACES
def test_no_neighbouring_schedule_keeps_more_of_the_spread(space, first):
    target = gaussian(1.0, space)
    best = kl_optimal(6, first, space)
    top = end_std(target, best)
    for i in range(1, 6):
        for factor in (0.97, 1.03):
            other = best.clone()
            other[i] *= factor
            assert end_std(target, check_sigmas(other)) < top


def test_flow_levels_of_eight_steps():
    want = [1, 0.834089, 0.707107, 0.599456, 0.5, 0.400544, 0.292893, 0.165911, 0]
    torch.testing.assert_close(kl_optimal(8, 1.0, FLOW), torch.tensor(want, dtype=torch.float64), rtol=0, atol=5e-7)
    assert end_std(gaussian(1.0, FLOW), kl_optimal(8, 1.0, FLOW)) == pytest.approx(0.856232, abs=5e-7)


def test_a_smaller_spread_puts_more_steps_at_low_noise():
    low, high = (kl_optimal(10, 14.6, VE, c) for c in (0.5, 1.4))
    assert (low[1:-1] < high[1:-1]).all()


@SPACES
def test_one_step_goes_from_the_first_level_to_zero(space, first):
    assert kl_optimal(1, first, space).tolist() == [first, 0.0]


@SPACES
@pytest.mark.parametrize("steps", [1, 3, 50, 1000])
def test_it_starts_exactly_at_the_first_level_and_ends_exactly_at_zero(space, first, steps):
    sigmas = check_sigmas(kl_optimal(steps, first, space))
    assert len(sigmas) == steps + 1 and float(sigmas[0]) == first and float(sigmas[-1]) == 0.0


@pytest.mark.parametrize(("steps", "first", "c", "words"), [(0, 1.0, 1.0, "at least 1 step"), (3, -1.0, 1.0, "sigma_max = -1"), (3, 1.0, 0.0, "c = 0")])  # fmt: skip
def test_impossible_settings_are_refused(steps, first, c, words):
    with pytest.raises(ValueError, match=words):
        kl_optimal(steps, first, VE, c)
