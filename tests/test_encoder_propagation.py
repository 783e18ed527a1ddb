"""Key steps, plans and costs: against the paper's own sets, brute force and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pack.kernels.encoder_propagation import (
    Costs,
    Plan,
    Reuse,
    add_prior_noise_,
    boundary_keys,
    fewest_keys,
    forecast_weight,
    make_plan,
    optimal_keys,
    published_keys,
    speedup,
    spread_keys,
    step_weights,
    transfer_keys,
    uniform_keys,
)
from pack.kernels.space import NoiseSpace


def falling(steps: int) -> list[float]:
    """n+1 noise levels from 14 to 0."""
    return [14 * (1 - i / steps) ** 2 for i in range(steps + 1)]


def times(steps: int) -> list[float]:
    """The stock "normal" schedule's share of the training time per step: equal steps from 999 to 0."""
    return [(999 - 999 * i / (steps - 1)) / 1000 for i in range(steps)]


@pytest.mark.parametrize(
    ("steps", "keys"),
    [
        (50, {0, 1, 2, 3, 5, 10, 15, 25, 35}),  # the paper's own list
        (20, {0, 1, 2, 4, 6, 10, 14}),
        (25, {0, 1, 2, 3, 5, 8, 12, 17}),
        (30, {0, 1, 2, 3, 6, 9, 15, 21}),
    ],
)
def test_published_keys_follow_the_training_time(steps, keys):
    assert published_keys(times(steps)) == keys


def test_published_keys_of_a_run_that_starts_late_keep_the_first_step():
    assert published_keys([0.45, 0.4, 0.35, 0.28, 0.2]) == {0, 3}


def test_uniform_keys_are_every_nth_step():
    assert uniform_keys(10, 4) == {0, 4, 8} and uniform_keys(3, 1) == {0, 1, 2}
    with pytest.raises(ValueError, match="interval of at least 1, but it is 0"):
        uniform_keys(3, 0)


@pytest.mark.parametrize(("steps", "keys", "last"), [(50, 14, 2), (25, 9, 2), (10, 10, 2), (10, 1, 2), (7, 3, 0)])
def test_spread_keys_have_the_number_asked_for_and_end_as_asked(steps, keys, last):
    found = spread_keys(steps, keys, last)
    assert len(found) == keys and 0 in found
    assert set(range(steps - min(last, keys - 1), steps)) <= found


def test_conditioning_that_changes_at_a_level_makes_key_steps_on_both_sides_of_it():
    assert boundary_keys([8, 4, 2, 1, 0], [4.0]) == {1, 2}
    assert boundary_keys([8, 4, 2, 1, 0], [3.0]) == {2}
    assert boundary_keys([8, 4, 2, 1, 0], [0.0, 999.0]) == {0}


@pytest.mark.parametrize("keys", [{0, 3, 7, 8, 19}, {0, 1, 2, 4, 6, 10, 14}, {0}, set(range(20))])
def test_the_fitted_schedule_gets_its_own_keys_back(keys):
    assert transfer_keys(keys, falling(20), falling(20)) == keys


def test_a_run_of_another_length_keeps_the_share_of_key_steps():
    assert transfer_keys(uniform_keys(12, 4), falling(12), falling(24)) == uniform_keys(24, 4)
    for steps in (10, 25, 40, 50):
        moved = transfer_keys({0, 1, 2, 4, 8, 13, 18, 19}, falling(20), falling(steps))
        assert abs(len(moved) - 8 * steps / 20) <= 1.5 and 0 in moved


def test_speed_and_key_count_are_inverse():
    assert speedup(50, 9, 0.69) == pytest.approx(50 / (9 + 41 * 0.69))
    for steps, speed, share in [(50, 1.5, 0.2), (20, 1.3, 0.5), (30, 2.5, 0.05)]:
        keys = fewest_keys(steps, speed, share)
        assert speedup(steps, keys, share) >= speed > speedup(steps, keys + 1, share)
    assert fewest_keys(20, 5.0, 0.9) == 1 and fewest_keys(20, 2.0, 1.0) == 20


def test_the_cost_of_a_step_is_the_share_of_the_blocks_that_run():
    costs = Costs((0.1, 0.2, 0.1), 0.1, (0.2, 0.2, 0.1))
    assert costs.of_step(Reuse(0, 0)) == pytest.approx(0.5)  # the decoder, as published
    assert costs.of_step(Reuse(1, 2)) == pytest.approx(0.2)
    assert costs.of_step(Reuse(3, 0)) == pytest.approx(0.9)


def test_a_reuse_that_does_not_fit_is_refused():
    assert list(Reuse(0, 0).check(3).kept_skips(3)) == [0, 1, 2] and list(Reuse(1, 2).check(3).kept_skips(3)) == []
    for wrong in (Reuse(-1, 0), Reuse(0, 3), Reuse(2, 2)):
        with pytest.raises(ValueError, match="UNet of 3 input and 3 output blocks"):
            wrong.check(3)


# --- the optimum ---


def brute_force(errors, weights, always, count):
    gaps, ages, steps = errors.shape
    best = math.inf, None
    for rest in itertools.combinations(range(1, steps), count - 1):
        keys = (0, *rest)
        if not always <= set(keys):
            continue
        total = 0.0
        for j in set(range(steps)) - set(keys):
            last = max(k for k in keys if k < j)
            earlier = [k for k in keys if k < last]
            gap = min(last - earlier[-1], gaps - 1) if earlier else 0
            total += weights[j] * float(errors[gap, j - last - 1, j]) if j - last <= ages else math.inf
        best = min(best, (total, keys), key=lambda item: item[0])
    return best


@pytest.mark.parametrize("gaps", [1, 4])
@pytest.mark.parametrize("always", [set(), {0, 3, 8}])
def test_the_optimum_equals_brute_force(gaps, always):
    generator = torch.Generator().manual_seed(gaps)
    steps, ages = 9, 3
    errors = torch.rand(gaps, ages, steps, generator=generator, dtype=torch.float64)
    weights = torch.rand(steps, generator=generator).tolist()
    found = optimal_keys(errors, weights, always)
    for count in range(1, steps + 1):
        total, keys = brute_force(errors, weights, always, count)
        if math.isinf(total):
            assert count not in found
        else:
            assert found[count][0] == pytest.approx(total) and found[count][1] == set(keys)


def test_step_weights_are_the_euler_gain_over_the_spread():
    ve, flow = NoiseSpace("ve"), NoiseSpace("flow")
    assert step_weights([3.0, 1.0, 0.0], ve) == pytest.approx([2 / 3 / math.sqrt(10), 1 / math.sqrt(2)])
    assert step_weights([0.8, 0.4, 0.0], flow) == pytest.approx([0.5 / math.sqrt(0.68), 1 / math.sqrt(0.52)])


# --- plans ---


def plan(keys, steps=10, forecast=False) -> Plan:
    return make_plan(falling(steps), [100 * (1 - i / steps) for i in range(steps)], keys, forecast=forecast)


def test_a_plan_finds_the_step_of_any_evaluation():
    p = plan({0, 4})
    s = p.sigmas
    assert [p.step(x) for x in s[:-1]] == list(range(10))
    assert p.step((s[3] + s[4]) / 2) == 3 and p.step(s[0] * 1.1) == 0 and p.step(1e-9) == 9
    assert p.step(s[5] * (1 + 1e-7)) == 5 and p.on_grid(5, s[5] * (1 + 1e-7)) and not p.on_grid(5, s[5] * 0.99)
    assert p.time(s[4]) == p.times[4] and p.times[4] > p.time((s[4] + s[5]) / 2) > p.times[5]


def test_only_the_features_that_are_used_are_captured():
    assert plan({0, 1, 2, 5, 8, 9}).captured == {2, 5}
    assert plan({0, 1, 2, 5, 8, 9}, forecast=True).captured == {1, 2, 5}
    assert plan(range(10), forecast=True).captured == frozenset()


def test_a_group_ends_before_the_next_key_step():
    p = plan({0, 4})
    assert p.group(2) == range(2, 4) and p.group(5) == range(5, 10)


def test_the_last_steps_and_everything_outside_the_active_part_are_key_steps():
    s, t = falling(10), [float(i) for i in range(10)]
    assert make_plan(s, t, {0, 5}, forecast=False, last=2).keys == {0, 5, 8, 9}
    assert make_plan([*s[:-1], 0.1], t, {0, 5}, forecast=False, last=2).keys == {0, 5}  # it does not end at 0
    assert make_plan(s, t, {0}, forecast=False, active=(s[2], s[6])).keys == {0, 1, 7, 8, 9}
    assert make_plan(s, t, {0}, forecast=False, always={3, 77}).keys == {0, 3}


def test_a_forecast_goes_on_along_the_line_but_not_far():
    assert forecast_weight(70, 80, 90) == 1.0 and forecast_weight(75, 80, 90) == 0.5
    assert forecast_weight(0, 80, 90) == 1.5 and forecast_weight(85, 80, 90) == 0.0 and forecast_weight(1, 5, 5) == 0.0


# --- prior noise ---


def test_prior_noise_is_the_papers_formula_in_variance_preserving_latents():
    x, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    sigma = 0.7
    want = x / math.sqrt(1 + sigma**2) + 0.003 * noise
    got = add_prior_noise_(x.clone(), noise, sigma, 0.003, NoiseSpace("ve"))
    torch.testing.assert_close(got / math.sqrt(1 + sigma**2), want)
    torch.testing.assert_close(add_prior_noise_(x.clone(), noise, 0.5, 0.01, NoiseSpace("flow")), x + 0.01 * noise)
