"""Stretching and trimming of schedules, against NumPy's interpolation and the rules that ComfyUI documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pack.kernels.schedules import (
    check_sigmas,
    end_at_zero,
    exactly_for_denoise,
    for_denoise,
    resample_loglinear,
    resample_theta,
    truncated_for_denoise,
)
from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
FITTED = {
    VE: torch.tensor([14.6146, 3.86, 1.9, 0.96, 0.4, 0.03, 0.0], dtype=torch.float64),
    FLOW: torch.tensor([1.0, 0.93, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64),
}
SPACES = pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])

LEVELS = torch.tensor([14.6, 3.9, 1.9, 0.96, 0.4, 0.03], dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 20, 200])
def test_resampling_is_linear_interpolation_of_the_logarithm(steps):
    at = np.linspace(0, len(LEVELS) - 1, steps + 1)
    want = np.exp(np.interp(at, np.arange(len(LEVELS)), np.log(LEVELS.numpy())))
    np.testing.assert_allclose(resample_loglinear(LEVELS, steps).numpy(), want, rtol=1e-12)


def test_resampling_to_the_native_count_changes_nothing():
    torch.testing.assert_close(resample_loglinear(LEVELS, len(LEVELS) - 1), LEVELS, rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 1000])
def test_resampled_schedules_keep_both_ends_and_decrease(steps):
    sigmas = resample_loglinear(LEVELS, steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(14.6) and sigmas[-1] == pytest.approx(0.03)
    check_sigmas(sigmas)


def test_the_result_keeps_the_dtype_of_the_levels():
    assert resample_loglinear(LEVELS.float(), 3).dtype == torch.float32


def test_ending_at_zero_replaces_the_last_level_and_leaves_the_input_alone():
    before = LEVELS.clone()
    assert end_at_zero(LEVELS).tolist() == [*LEVELS.tolist()[:-1], 0.0]
    assert torch.equal(LEVELS, before)


@pytest.mark.parametrize(("steps", "denoise", "total"), [(10, 0.25, 40), (20, 0.6, 33), (1, 0.01, 100), (8, 0.99, 8)])
def test_denoise_runs_the_last_steps_of_a_longer_schedule(steps, denoise, total):
    asked = []

    def schedule(n):
        asked.append(n)
        return torch.linspace(1, 0, n + 1)

    sigmas = for_denoise(schedule, steps, denoise)
    assert asked == [total]
    assert torch.equal(sigmas, torch.linspace(1, 0, total + 1)[-(steps + 1) :])


def test_denoise_one_is_the_whole_schedule_and_zero_is_none():
    whole = for_denoise(lambda n: torch.linspace(1, 0, n + 1), 7, 1.0)
    assert torch.equal(whole, torch.linspace(1, 0, 8))
    assert for_denoise(lambda n: torch.linspace(1, 0, n + 1), 7, 0.0).numel() == 0


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([2.0, 1.0, 1.0], r"sigmas\[1\] = 1 is followed by 1"),
        ([1.0, 2.0], r"sigmas\[0\] = 1 is followed by 2"),
        ([float("nan"), 1.0], r"finite and not negative, but sigmas\[0\]"),
        ([1.0, -0.5], r"sigmas\[1\] = -0.5"),
        ([1.0], "at least 2 noise levels"),
        ([[1.0, 0.0]], "at least 2 noise levels in one row"),
    ],
)
def test_bad_schedules_are_named_by_place_and_value(sigmas, words):
    with pytest.raises(ValueError, match=words):
        check_sigmas(torch.tensor(sigmas))


@pytest.mark.parametrize("steps", [0, -3])
def test_resampling_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"at least 1 step, but steps = {steps}"):
        resample_loglinear(LEVELS, steps)


def test_resampling_refuses_a_zero_level():
    with pytest.raises(ValueError, match="append the final 0 afterwards"):
        resample_loglinear(torch.tensor([1.0, 0.0]), 3)


@SPACES
@pytest.mark.parametrize("denoise", [1.0, 0.61, 0.2])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_theta_resampling_is_scipys_monotone_cubic_of_the_angle(space, steps, denoise):
    from scipy.interpolate import PchipInterpolator

    sigmas = FITTED[space]
    m = len(sigmas) - 1
    curve = PchipInterpolator(np.arange(m + 1), space.angle(sigmas).numpy())
    want = space.at_angle(torch.from_numpy(curve(np.linspace(m * (1 - denoise), m, steps + 1))))
    torch.testing.assert_close(resample_theta(sigmas, steps, space, denoise), want, rtol=1e-9, atol=1e-15)


@SPACES
def test_theta_resampling_returns_the_native_levels_to_the_bit_and_doubling_keeps_them(space):
    for dtype in (torch.float32, torch.float64):
        sigmas = FITTED[space].to(dtype)
        n = len(sigmas) - 1
        assert torch.equal(resample_theta(sigmas, n, space), sigmas)
        for factor in (2, 3, 10):
            assert torch.equal(resample_theta(sigmas, factor * n, space)[::factor], sigmas)


@SPACES
@pytest.mark.parametrize("steps", [1, 2, 3, 17, 60])
@pytest.mark.parametrize("denoise", [1.0, 0.9, 0.5, 0.33, 0.1, 0.02])
def test_theta_resampled_schedules_decrease_to_zero(space, steps, denoise):
    sigmas = check_sigmas(resample_theta(FITTED[space].float(), steps, space, denoise))
    assert len(sigmas) == steps + 1 and float(sigmas[-1]) == 0


@SPACES
@pytest.mark.parametrize("levels", [[1.0, 0.0], [1.0, 0.3, 0.0]])
def test_theta_resampling_of_one_and_two_steps(space, levels):
    sigmas = torch.tensor(levels, dtype=torch.float64)
    check_sigmas(resample_theta(sigmas, 9, space))
    assert torch.equal(resample_theta(sigmas, len(levels) - 1, space), sigmas)


@SPACES
def test_exact_denoise_is_continuous_and_equals_the_stock_rule_at_whole_ratios(space):
    resample = lambda n, denoise: resample_theta(FITTED[space], n, space, denoise)
    for steps, denoise in [(5, 0.5), (4, 0.25), (10, 0.2), (6, 1.0)]:
        stock = for_denoise(lambda n: resample(n, 1.0), steps, denoise)
        torch.testing.assert_close(exactly_for_denoise(resample, steps, denoise), stock, rtol=1e-9, atol=1e-15)
    starts = torch.stack([exactly_for_denoise(resample, 8, d)[0] for d in np.linspace(0.2, 0.9, 701)])
    assert (starts[1:] / starts[:-1]).max() < 1.05
    jumps = torch.stack([for_denoise(lambda n: resample(n, 1.0), 8, d)[0] for d in np.linspace(0.2, 0.9, 701)])
    assert (jumps[1:] / jumps[:-1]).max() > 1.05


def test_exact_denoise_of_a_published_table_ends_where_the_table_ends():
    half = resample_loglinear(LEVELS, 10, 0.5)
    assert len(half) == 11 and float(half[-1]) == pytest.approx(float(LEVELS[-1]))
    torch.testing.assert_close(half, resample_loglinear(LEVELS, 20)[-11:], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("steps", "denoise", "kept"),
    [(10, 0.25, 2), (10, 0.05, 0), (10, 0.15, 2), (10, 0.35, 4), (10, 1.0, 10), (10, 0.0, 0), (3, 2.0, 3)],
)
def test_truncation_keeps_as_many_steps_as_the_builtin_node(steps, denoise, kept):
    whole = torch.linspace(1, 0, steps + 1)
    got = truncated_for_denoise(lambda n: torch.linspace(1, 0, n + 1), steps, denoise)
    assert torch.equal(got, whole[-(kept + 1) :] if kept else torch.empty(0))


def test_no_denoise_is_no_step_in_the_exact_mode():
    assert exactly_for_denoise(lambda n, d: torch.linspace(d, 0, n + 1), 5, 0.0).numel() == 0
