"""What a tuning run costs, says and leaves behind."""

from __future__ import annotations

import pytest
import torch

from pack.kernels.gate import judge
from pack.kernels.timestep_aligner import Alignment
from pack.kernels.tuner import TUNER_PRESETS, Progress, Tuned
from pack.models.calibration import ModelIdentity
from pack.models.store import load_profile, save_profile
from pack.nodes._plan.fit_sampler import (
    Setting,
    affordable,
    aligned_profile,
    stopped_profile,
    tuned_profile,
    tuning_report,
)

RANGE = ModelIdentity(("SDXL", "BASE"), "ve", 0.0292, 14.6146, "eps", "0123456789abcdef")
SETTING = Setting(RANGE, "euler", "euler", 6.0, (1024, 768), 3)
LEVELS = torch.tensor([14.6146, 4.0, 1.0, 0.0])
FITTED = Alignment((14.6146, 4.0, 1.0), (12.0, 3.0, 0.7), (0.5, 0.4, 0.3))
FOUND = Tuned(
    LEVELS,
    FITTED,
    "karras",
    {"normal": 0.4, "karras": 0.3},
    {"start": 0.31, "refined": 0.2, "aligned": 0.1},
    0.01,
    392,
    verdicts={"refined": judge(torch.full((6,), 0.31), torch.linspace(0.19, 0.21, 6), looks=2)},
)
NOTHING = Tuned(
    LEVELS, None, "karras", {"karras": 0.3}, {"start": 0.31}, 0.01, 264, ["The refined levels were not kept."]
)


@pytest.mark.parametrize(
    ("preset", "aligned", "calls"),
    [("mini", True, 772), ("mini", False, 596), ("quick", True, 1704), ("standard", True, 3416)],
)
def test_the_presets_cost_what_the_help_page_says(preset, aligned, calls):
    assert TUNER_PRESETS[preset].evaluations(8, 20, 1, aligned) == calls


def test_a_preset_that_takes_too_long_becomes_a_smaller_one():
    assert affordable("standard", 8, 20, 1, True, 1.5, 0)[0] is TUNER_PRESETS["standard"]
    preset, said = affordable("standard", 8, 20, 1, True, 1.5, 45)
    assert preset is TUNER_PRESETS["quick"] and "'standard' would take longer" in said and "42.6 minutes" in said
    with pytest.raises(ValueError, match=r"smallest preset 'mini' needs 19\.3 minutes, but 'budget_minutes' is 5"):
        affordable("quick", 8, 20, 1, True, 1.5, 5)


def test_a_tuned_profile_travels_through_its_file(tmp_path):
    profile = tuned_profile(FOUND, SETTING, "mini", 61.26)
    again = load_profile(save_profile(profile, tmp_path))
    assert again == profile and again.is_fitted and again.families == ("SDXL",)
    assert again.alignments[0].solver == "euler" and again.alignments[0].sigma[0] == 1.0
    assert again.metrics["held_out"]["aligned"] == 0.1 and again.provenance["evaluations"] == 392


def test_nothing_found_is_said():
    profile, report = (
        tuned_profile(NOTHING, SETTING, "mini", 9.0),
        tuning_report(NOTHING, SETTING, 9.0, "plan"),
    )
    assert profile.method == "tuned schedule"
    assert profile.alignments == () and list(profile.sigmas) == LEVELS.tolist()
    assert "No better schedule found" in report and "refined levels were not kept" in report
    found = tuning_report(FOUND, SETTING, 9.0, "plan")
    assert "No better" not in found and "(-35.5%, median -36.1%, 100% of 6 pictures better)" in found


def test_a_sampler_with_noise_names_the_one_that_was_run():
    sde = Setting(RANGE, "dpmpp_2m_sde", "dpmpp_2m", 6.0, (1024, 768), 3)
    assert "Fitted with dpmpp_2m, which dpmpp_2m_sde follows" in tuning_report(NOTHING, sde, 9.0, "plan")


def test_an_alignment_that_was_not_kept_leaves_the_levels_alone():
    profile = aligned_profile(None, LEVELS.tolist(), SETTING, {"held_out": {"start": 0.3}})
    assert profile.alignments == () and profile.method == "aligned timesteps"


def test_a_stopped_search_leaves_a_profile_that_says_so(tmp_path):
    now = Progress("refining", 200, 392, LEVELS, 0.2)
    profile = load_profile(save_profile(stopped_profile(now, SETTING), tmp_path))
    assert profile.name.endswith(", tuned schedule, stopped") and list(profile.sigmas) == LEVELS.tolist()
    assert "held_out" not in profile.metrics and "Stopped while refining: not proved" in profile.describe()
