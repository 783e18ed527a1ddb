"""Which repetitions of a test each run asks, and which `dev.py test --all` alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

# Workflows that each day draws in small.
REPEATED = [
    "aligned_ksampler", "aligned_schedule", "apply_profile", "attention", "calibration_set", "compare_profile",
    "draft_seeds", "everything_at_once", "few_step", "first_picture", "flow_model", "golden_noise",
    "golden_noise_advanced", "img2img", "long_video", "noise_shift", "noise_space", "noise_space_keep",
    "noise_space_morph", "noise_space_variation", "one_more_step", "one_more_step_colour", "one_more_step_few_steps",
    "precision", "propagation_controlnet", "propagation_transformer", "redenoise", "signal_leak", "timestep_field",
    "zigzag",
]  # fmt: skip
# Fits and trainings take longest, and one is of a size of its own. Their nodes are asked in small in tests/host.
LONG = [
    "align_timesteps", "fit_attention", "fit_fast", "fit_noise_shift", "fit_propagation", "fit_sampler", "noise_mask",
    "protect", "share_a_profile", "train_npnet", "train_one_more_step", "training_noise",
]  # fmt: skip


def daily(values: Iterable, *telling, names: int = 1) -> list:
    """Parameters for `parametrize`: those in `telling` each time, the rest in the night.

    names: how many arguments a value is for, of more than one a tuple. What is in `telling` alone, as the samplers that
    another host may lack, is passed over.
    """
    unpacked = lambda value: (value,) if names == 1 else value
    return [
        value if value in telling else pytest.param(*unpacked(value), marks=pytest.mark.nightly) for value in values
    ]
