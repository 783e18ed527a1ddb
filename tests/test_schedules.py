"""Stretching and trimming of schedules, against NumPy's interpolation and the rules that ComfyUI documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pack.kernels.schedules import check_sigmas, end_at_zero, for_denoise, resample_loglinear

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
