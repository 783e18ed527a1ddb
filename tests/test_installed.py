"""The list of what is installed, and what is said of a profile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import FAMILIES, FULL

from pack.models.calibration import Calibration, CondLevels, ModelIdentity, fitted
from pack.models.store import shipped_profiles
from pack.nodes._plan.auto import Shelf
from pack.nodes._plan.installed import about, listing, made_for

MINE = replace(
    shipped_profiles()["Attune demo unet, euler, 8 steps"],
    families=("SD15",),
    prediction="eps",
    config_hash="theirs",
    cfg=3.0,
)
SHIFT = Calibration(
    "s", "m", "flow", ("SD3",), (1024, 1024), (), "", kind="noise_shift",
    alignments=tuple(CondLevels("", (n, n), (0.2, 0.8), (0.21, 0.82)) for n in (512, 768)),
)  # fmt: skip
SHELF = Shelf(
    {"mine.json": MINE, "small.json": SHIFT, "AYS SDXL": shipped_profiles()["AYS SDXL"]}, {"o": ("SD15", 1024)}
)


def test_each_file_has_a_line_with_what_it_was_made_for():
    assert listing(SHELF, []).splitlines() == [
        "Profiles, 3",
        "- mine.json: schedule for SD15, 128x128, euler, 8 steps, cfg 3",
        "- small.json: noise shift for SD3, 512x512 and 768x768",
        "- AYS SDXL: schedule for SDXL, 1024x1024, any steps",
        "",
        "One More Step, 1",
        "- o: for SD15 latents and prompts of width 1024",
    ]


def test_a_star_marks_what_was_made_for_the_model_and_unread_files_are_named():
    said = listing(SHELF, ["bad.json is not a profile."], FAMILIES["SD 1.5"].facts.model)
    assert "Profiles, 3 (* made for this model, SD15)\n* mine.json" in said and "\n- AYS SDXL" in said
    assert said.endswith("Cannot be read, 1\n! bad.json is not a profile.")


SDXL, SSD1B = (
    ModelIdentity(families, "ve", 0.0292, 14.6146, "eps", network, weights_hash=weights)
    for families, network, weights in ((("SDXL",), "xl", "w1"), (("SSD1B", "SDXL"), "ssd", "w2"))
)


def test_a_smaller_relatives_calibration_has_no_star_for_the_whole_model_nor_the_other_way_round():
    of_xl, of_ssd = (
        fitted(model, "schedule", "euler", "m", (1024, 1024), {}, solver="euler", sigmas=(14.0, 2.0, 0.0))
        for model in (SDXL, SSD1B)
    )
    assert [made_for(of_xl, SDXL), made_for(of_xl, SSD1B)] == [True, False]
    assert [made_for(of_ssd, SSD1B), made_for(of_ssd, SDXL)] == [True, False]
    tables = [one for one in shipped_profiles().values() if one.name == "AYS SDXL"]
    assert made_for(tables[0], SDXL) and made_for(tables[0], SSD1B)  # published for the family: said by the loader


@pytest.mark.parametrize("aspect", ["config_hash", "weights_hash", "prediction"])
def test_no_star_for_another_network_other_weights_or_another_prediction(aspect):
    one = fitted(SDXL, "schedule", "euler", "m", (1024, 1024), {}, sigmas=(14.0, 2.0, 0.0))
    assert made_for(one, SDXL) and not made_for(one, replace(SDXL, **{aspect: "other"}))
    assert made_for(replace(one, patches="none"), replace(SDXL, patches="a LoRA"))  # of the same model still


def test_a_full_shelf_names_its_networks():
    assert f"Golden noise, {len(FULL.npnets)}\n" in listing(FULL, []) and FULL.npnets


def test_a_profile_says_in_sentences_what_it_is_and_what_was_measured():
    said = about(shipped_profiles()["Attune demo unet, euler, 5 steps"]).splitlines()
    assert said[0] == "Attune demo unet, euler, 5 steps: schedule for AttuneDemo, 128x128, euler, 5 steps, cfg 3."
    assert said[2].startswith("Fitted on 2026-") and " with preset 'quick'." in said[2]
    best, ours = (float(line[2:8]) for line in said[4:6])
    assert "the best known schedule, karras" in said[4] and best > ours and said[5].endswith(": this profile")
    assert "which this profile is" in about(shipped_profiles()["Attune demo unet, euler, 8 steps"])


@pytest.mark.parametrize("profile", shipped_profiles().values(), ids=lambda one: one.name)
def test_no_profile_of_ours_is_told_as_data(profile):
    said = about(profile)
    assert not any(sign in said for sign in '{}[]"') and len(said) < 1500
    assert said.count("\n- ") >= len(profile.runs) + (len(profile.alignments) if not profile.sigmas else 0)


@pytest.mark.parametrize(
    "odd", [None, [], {}, "x", float("nan"), 10**400, {"a": 10**400}, {"a": "b"}, [1], {"a": {}}, True]
)
def test_free_form_facts_of_any_kind_are_passed_over(odd):
    keys = ("held_out", "start", "refused", "date", "seconds", "preset")
    plain = replace(MINE, metrics={}, provenance={})
    assert about(replace(plain, metrics=dict.fromkeys(keys, odd), provenance=dict.fromkeys(keys, odd)))
