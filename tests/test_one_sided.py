"""One-sided steps against differences of guidance that are known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from pack.kernels.one_sided import DAMPED, Difference, Differences, line_weight, one_sided_steps
from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")


def test_every_second_step_is_one_sided_and_none_that_must_be_whole():
    every = range(30)
    assert one_sided_steps(12, {}, every, 3) == {3, 5, 7}
    assert one_sided_steps(12, {3, 6}, every, 3) == {4, 7}
    assert one_sided_steps(6, {}, every, 3) == frozenset()
    assert one_sided_steps(14, {9}, {0, 4, 8, 9, 10, 11, 12, 13}, 3) == {3, 5, 6, 7, 10}  # features are reused at some
    for steps in every:
        chosen = sorted(one_sided_steps(steps, {4}, every, 4))
        assert all(b - a >= 2 for a, b in pairwise(chosen)) and 4 not in chosen
        assert all(3 <= i < steps - 4 for i in chosen)


def differences(space, e_of, sigmas, sides="a"):
    kept = Differences(space)
    for step, sigma in enumerate(sigmas):
        kept.keep(None, Difference(step, sigma, sides, e_of(sigma)))
    return kept


@pytest.mark.parametrize("space", [VE, FLOW])
def test_half_of_the_line_in_log_snr_is_gone_on(space):
    """For e affine in ln(sigma / alpha) the whole line would be exact, so half the change is missed."""
    ratio = lambda sigma: float(space.log_ratio(torch.tensor(sigma, dtype=torch.float64)))
    e_of = lambda sigma: torch.tensor([[20.0 + 3.0 * ratio(sigma)]], dtype=torch.float64)
    sigmas, now = [0.9, 0.6], 0.5
    found = differences(space, e_of, sigmas).predict(None, 1, now, "a", e_of(now))
    assert torch.allclose(found, e_of(0.6) + DAMPED * (e_of(now) - e_of(0.6)))
    constant = lambda sigma: torch.full((1, 1), 5.0)
    assert torch.equal(differences(space, constant, sigmas).predict(None, 1, now, "a", constant(now)), constant(now))


def test_the_line_of_two_gaussians_beats_holding_the_last_difference():
    """Both prompts N(mean, s^2): D = mean + s^2 / (s^2 + sigma^2) (x - mean), so e = (m1 - m2) sigma / (s^2 + sigma^2)."""
    e_of = lambda sigma: torch.tensor([[sigma / (0.25 + sigma**2)]], dtype=torch.float64)
    for sigmas in ([4.0, 3.0, 2.2], [0.4, 0.3, 0.22]):
        found = differences(VE, e_of, sigmas[:2]).predict(None, 1, sigmas[2], "a", e_of(1.0))
        assert abs(found - e_of(sigmas[2])) < 0.7 * abs(e_of(sigmas[1]) - e_of(sigmas[2]))


def test_one_picture_that_is_predicted_badly_is_not_hidden_by_the_others():
    steady, turning = torch.full((7, 3), 100.0), torch.ones(1, 3)
    sigmas = [4.0, 3.0, 2.0]
    for turns, trusted in ((1.0, True), (-1.0, False)):
        kept = Differences(VE)
        for step, sigma in enumerate(sigmas):
            e = torch.cat([steady, turning * (turns if step == 2 else 1.0), torch.zeros(1, 3)])
            kept.keep(None, Difference(step, sigma, "a", e))
        assert (kept.predict(None, 2, 1.5, "a", e) is not None) == trusted


def test_where_there_is_no_line_the_last_is_held():
    assert line_weight(FLOW, 0.9, 0.95, 1.0) == 0  # no signal at 1: the log-SNR has no distance to it
    assert line_weight(VE, 1.0, 1.0, 2.0) == 0 and line_weight(VE, 1.0, 2.0, 2.0) == 0
    assert line_weight(VE, 0.01, 1.0, 1.1) == DAMPED  # not further than the last distance


ONE = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("since", "sigma", "sides", "like", "window"),
    [
        (2, 0.5, "a", ONE, None),  # the step before was not kept
        (1, 0.7, "a", ONE, None),  # the levels rise: another run
        (1, 0.5, "b", ONE, None),
        (1, 0.5, "a", torch.ones(1, 3), None),
        (1, 0.5, "a", ONE.double(), None),
        (1, 0.5, "a", ONE, (0, 1)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_predicted(since, sigma, sides, like, window):
    kept = differences(VE, lambda sigma: ONE, [0.9, 0.6])
    assert kept.predict(None, 1, 0.5, "a", ONE) is not None
    assert kept.predict(window, since, sigma, sides, like) is None


def test_after_a_prediction_worth_nothing_the_next_step_is_whole():
    for worth, trusted in ((1.5, True), (-1.0, False)):  # errors of 1/3 and of 2 of the difference
        kept = differences(VE, lambda sigma: ONE, [0.9])
        kept.keep(None, Difference(1, 0.6, "a", worth * ONE))
        assert (kept.predict(None, 1, 0.5, "a", ONE) is not None) is trusted
    kept.keep(None, Difference(3, 0.4, "a", -ONE))
    assert kept.predict(None, 3, 0.3, "a", ONE) is not None


def test_other_prompts_begin_anew_and_equal_ones_are_no_error():
    kept = differences(VE, lambda sigma: ONE, [0.9])
    kept.keep(None, Difference(1, 0.6, "b", -ONE))
    assert torch.equal(kept.predict(None, 1, 0.5, "b", ONE), -ONE)
    nothing = differences(VE, lambda sigma: 0 * ONE, [0.9, 0.6])
    assert torch.equal(nothing.predict(None, 1, 0.5, "a", ONE), 0 * ONE)
    assert math.isclose(line_weight(VE, 0.5, 0.6, 0.9), DAMPED * math.log(0.6 / 0.5) / math.log(0.9 / 0.6))
