"""Key steps, plans and costs: against the paper's own sets, brute force and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pack.kernels.propagation import (
    SAME_PLACE,
    Costs,
    FeatureCache,
    Reuse,
    ReusePlan,
    add_prior_noise_,
    boundary_keys,
    fewest_keys,
    fine_detail,
    forecast_weight,
    make_plan,
    optimal_keys,
    published_keys,
    resemblance,
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


@pytest.mark.parametrize("rounded", [lambda i: 981 - 20 * i, lambda i: round(999 - 19.98 * i), lambda i: 999 - 20 * i])
def test_published_keys_of_50_steps_are_the_papers_where_timesteps_are_rounded(rounded):
    """Its own DDIM steps, the host's sgm_uniform, and its simple."""
    assert published_keys([rounded(i) / 999 for i in range(50)]) == {0, 1, 2, 3, 5, 10, 15, 25, 35}


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


FALL = [1.0, 0.8, 0.5, 0.2, 0.0]


@pytest.mark.parametrize(
    ("kind", "scale", "sigmas"), [("ve", 1.0, [9.0, 4.0, 1.5, 0.4, 0.0]), ("flow", 1.0, FALL), ("flow", 8.0, FALL)]
)
def test_a_step_weight_is_the_exact_effect_on_a_unit_gaussian(kind, scale, sigmas):
    """An error of the denoised latent in one Euler step, then the exact flow to 0."""
    space = NoiseSpace(kind, scale)
    spread = lambda sigma: math.hypot(float(space.alpha(torch.tensor(sigma))), scale * sigma)
    for weight, (sigma, after) in zip(step_weights(sigmas, space), itertools.pairwise(sigmas), strict=True):
        end = lambda denoised, x=1.3: (denoised + (x - denoised) * after / sigma) / spread(after)  # noqa: B023
        assert end(0.7 + 0.01) - end(0.7) == pytest.approx(0.01 * weight, rel=1e-6)


@pytest.mark.parametrize(("kind", "top"), [("ve", 14.0), ("flow", 1.0)])
@pytest.mark.parametrize("steps", [10, 30])
def test_step_weights_are_near_the_effect_within_an_euler_run(kind, top, steps):
    """On a unit Gaussian, where the denoised latent is alpha x / (alpha^2 + sigma^2); the last steps count most."""
    space, sigmas = NoiseSpace(kind), [top * (1 - i / steps) ** 2 for i in range(steps + 1)]

    def end(wrong: int | None) -> float:
        x = 1.0
        for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            alpha = float(space.alpha(torch.tensor(sigma, dtype=torch.float64)))
            denoised = alpha * x / (alpha**2 + sigma**2) + (0.01 if i == wrong else 0)
            x = denoised + (x - denoised) * after / sigma
        return x

    effects = [(end(i) - end(None)) / 0.01 for i in range(steps)]
    shares = [weight / effect for weight, effect in zip(step_weights(sigmas, space), effects, strict=True)]
    assert min(shares) > 0.97 and max(shares) < (1.35 if steps == 10 else 1.1)


# --- plans ---


def plan(keys, steps=10, forecast=False) -> ReusePlan:
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


# --- tiles ---


def test_fine_detail_tells_a_place_from_its_neighbour_at_every_noise_level():
    """A smooth picture under noise, as it was some steps before and as it is 1, 2 or 7 columns away."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 6, 64)
    smooth = torch.sin(ramp)[:, None] * torch.cos(2 * ramp)[None]
    picture = smooth + 0.3 * torch.randn(1, 4, 64, 64, generator=generator)
    noise = torch.randn(1, 4, 64, 64, generator=generator)
    for before, now in ((14.0, 9.0), (3.0, 1.0), (1.0, 0.2), (0.3, 0.05)):
        then, x = picture + before * noise, picture + now * noise
        assert resemblance(fine_detail(then), fine_detail(x)) > 0.4 > SAME_PLACE
        for columns in (1, 2, 7):
            moved = picture.roll(columns, -1) + now * noise.roll(columns, -1)
            assert resemblance(fine_detail(then), fine_detail(moved)) < 0.1 < SAME_PLACE


# --- prior noise ---


def test_prior_noise_is_the_papers_formula_in_variance_preserving_latents():
    x, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    sigma = 0.7
    want = x / math.sqrt(1 + sigma**2) + 0.003 * noise
    got = add_prior_noise_(x.clone(), noise, sigma, 0.003, NoiseSpace("ve"))
    torch.testing.assert_close(got / math.sqrt(1 + sigma**2), want)
    torch.testing.assert_close(add_prior_noise_(x.clone(), noise, 0.5, 0.01, NoiseSpace("flow")), x + 0.01 * noise)
    torch.testing.assert_close(add_prior_noise_(x.clone(), noise, 0.5, 0.01, NoiseSpace("flow", 8)), x + 0.08 * noise)


# --- the cache: what goes in comes out for the same condition, whatever the batches look like ---

LIKE = torch.zeros(1)


def rows(*values: float) -> dict:
    return {"h": torch.tensor(values, dtype=torch.float32)[:, None]}


def test_conditions_are_found_again_in_other_batches():
    cache = FeatureCache(depth=1)
    cache.store(["uncond", "cond"], 0, 9.0, "s", rows(1, 2, 10, 20))  # two pictures each
    assert cache.recall(["uncond", "cond"], "s", 0, 8.0, LIKE)["h"].flatten().tolist() == [1, 2, 10, 20]
    assert cache.recall(["cond", "uncond"], "s", 0, 8.0, LIKE)["h"].flatten().tolist() == [10, 20, 1, 2]
    assert cache.recall(["cond"], "s", 0, 8.0, LIKE)["h"].flatten().tolist() == [10, 20]


def test_a_whole_capture_is_recalled_without_a_copy():
    cache, features = FeatureCache(depth=1), rows(1, 2)
    cache.store(["a", "b"], 0, 9.0, "s", features)
    assert cache.recall(["a", "b"], "s", 0, 8.0, LIKE)["h"].data_ptr() == features["h"].data_ptr()


def test_missing_old_or_unfitting_features_are_never_used():
    cache = FeatureCache(depth=1)
    cache.store(["a"], 3, 9.0, "s", rows(1))
    assert cache.recall(["b"], "s", 0, 8.0, LIKE) is None
    assert cache.recall(["a"], "other shape", 0, 8.0, LIKE) is None
    assert cache.recall(["a"], "s", 4, 8.0, LIKE) is None
    assert cache.holds("a", 3) and not cache.holds("a", 4) and not cache.holds("b", 0)
    cache.clear()
    assert cache.recall(["a"], "s", 0, 8.0, LIKE) is None and cache.bytes == 0


def test_a_forecast_is_exact_for_features_that_are_linear_in_time():
    cache = FeatureCache(depth=2)
    cache.store(["a"], 0, 10.0, "s", rows(1.0))
    assert cache.recall(["a"], "s", 0, 7.0, LIKE)["h"].item() == 1.0  # one capture alone is held
    cache.store(["a"], 2, 8.0, "s", rows(3.0))
    assert cache.recall(["a"], "s", 0, 7.0, LIKE)["h"].item() == 4.0
    cache.store(["a"], 2, 8.0, "s", rows(3.5))  # the same step again replaces
    assert cache.recall(["a"], "s", 0, 8.0, LIKE)["h"].item() == 3.5


def test_a_forecast_goes_only_as_far_as_its_cache_reaches():
    """Features that stray by themselves, as where a solver adds noise, are nearer to half of the way than to all of it:
    of a random walk with a drift of 1 a step, of which the last step is known, the best forecast is the regression."""
    generator, n = torch.Generator().manual_seed(3), 20_000
    first, second = (1 + torch.randn(n, 1, 1, 1, generator=generator) for _ in range(2))
    regression = float((first * second).sum() / (first * first).sum())
    errors = {}
    for reach in (0.0, regression, 1.0):
        cache = FeatureCache(depth=2, reach=reach)
        cache.store(["a"], 0, 10.0, "s", {"h": torch.zeros_like(first)})
        cache.store(["a"], 1, 9.0, "s", {"h": first})
        errors[reach] = float((cache.recall(["a"], "s", 0, 8.0, first)["h"] - first - second).square().mean())
    assert 0.45 < regression < 0.55 and min(errors, key=lambda reach: errors[reach]) == regression


def test_a_calibration_chooses_its_sources():
    cache = FeatureCache(depth=4)
    for step, value in enumerate((1.0, 3.0, 9.0)):
        cache.store(["a"], step, 10.0 - step, "s", rows(value))
    assert cache.recall(["a"], "s", 0, 8.0, LIKE, sources=(0, None))["h"].item() == 1.0
    assert cache.recall(["a"], "s", 0, 8.0, LIKE, sources=(1, 0))["h"].item() == 5.0
    assert cache.recall(["a"], "s", 0, 8.0, LIKE, sources=(1, 7)) is None


def test_features_are_kept_in_the_type_asked_for_and_come_back_in_the_callers():
    cache = FeatureCache(depth=1, dtype=torch.float16)
    cache.store(["a"], 0, 9.0, "s", {"h": torch.randn(2, 8)})
    assert cache.bytes == 2 * 8 * 2
    assert cache.recall(["a"], "s", 0, 8.0, LIKE)["h"].dtype == torch.float32


def test_outputs_computed_ahead_are_served_once_all_are_there_and_dropped_by_a_new_capture():
    cache = FeatureCache(depth=1)
    cache.keep_ahead(["a", "b"], 5, "s", torch.tensor([[1.0], [2.0]]))
    assert cache.ahead(["b", "a"], 5, "s").flatten().tolist() == [2, 1]
    assert cache.ahead(["a"], 4, "s") is None and cache.ahead(["a", "c"], 5, "s") is None
    cache.store(["a"], 6, 1.0, "s", rows(0))
    assert cache.ahead(["a", "b"], 5, "s") is None and cache.ahead(["b"], 5, "s").item() == 2.0
