"""What a tuning run costs, says and leaves behind."""

from __future__ import annotations

from dataclasses import replace

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
    stopped_profile,
    tuned_profile,
    tuning_report,
)
from pack.nodes._plan.installed import about

RANGE = ModelIdentity(("SDXL",), "ve", 0.0292, 14.6146, "eps", "0123456789abcdef")
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


NEEDED = {name: one.evaluations(8, 20, 1, True) for name, one in TUNER_PRESETS.items()}


def test_a_preset_that_takes_too_long_becomes_a_smaller_one():
    assert affordable("standard", NEEDED, 1.5, 0)[0] is TUNER_PRESETS["standard"]
    preset, said = affordable("standard", NEEDED, 1.5, 45)
    assert preset is TUNER_PRESETS["quick"] and "'standard' would take longer" in said and "42.6 minutes" in said
    with pytest.raises(ValueError, match=r"smallest preset 'mini' needs 19\.3 minutes, but 'budget_minutes' is 5"):
        affordable("quick", NEEDED, 1.5, 5)


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
    assert "Nothing better was found" in report and "refined levels were not kept" in report
    found = tuning_report(FOUND, SETTING, 9.0, "plan")
    assert "Nothing better" not in found and "(-35.5%, median -36.1%, 100% of 6 pictures better)" in found


def test_a_sampler_with_noise_names_the_one_that_was_run():
    sde = Setting(RANGE, "dpmpp_2m_sde", "dpmpp_2m", 6.0, (1024, 768), 3)
    assert "Fitted with dpmpp_2m, which dpmpp_2m_sde follows" in tuning_report(NOTHING, sde, 9.0, "plan")


def test_the_report_says_what_was_switched_off_and_what_the_sampler_cannot_have():
    second = Setting(RANGE, "dpmpp_2m", "dpmpp_2m", 6.0, (1024, 768), 3)
    said = lambda setting, **what: tuning_report(NOTHING, setting, 9.0, "plan", **what)
    assert "'levels' is off" in said(SETTING, levels=False) and "'levels' is off" not in said(SETTING)
    assert "Timesteps are fitted for euler alone; dpmpp_2m keeps the true ones." in said(second)
    assert "Timesteps are fitted" not in said(second, timesteps=False) + said(SETTING)


def test_a_fit_names_the_network_the_weights_and_the_loras_and_needs_the_first():
    known = replace(SETTING, model=replace(RANGE, weights_hash="w", patches="p", shift=3.0))
    profile = tuned_profile(FOUND, known, "mini", 9.0)
    assert (profile.config_hash, profile.weights_hash, profile.patches) == ("0123456789abcdef", "w", "p")
    assert profile.provenance["shift"] == 3.0 and profile.solver == "euler" and profile.cfg == 6.0
    with pytest.raises(ValueError, match="does not say what network it has"):
        tuned_profile(FOUND, replace(SETTING, model=replace(RANGE, config_hash="")), "mini", 9.0)


def test_a_stopped_search_leaves_a_profile_that_says_so(tmp_path):
    now = Progress("refining", 200, 392, LEVELS, 0.2)
    profile = load_profile(save_profile(stopped_profile(now, SETTING), tmp_path))
    assert profile.name.endswith(", tuned schedule, stopped") and list(profile.sigmas) == LEVELS.tolist()
    assert "held_out" not in profile.metrics and "Stopped while refining: not proved" in about(profile)
