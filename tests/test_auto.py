"""What Attune Auto decides, family by family; docs/families.md holds the same table and is compared with it.

`ATTUNE_WRITE=1 python dev.py test tests/test_auto.py` writes the page's part.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from families import EVERYTHING, FAMILIES, FRESH, FULL, SD15, SDXL

from pack.kernels.propagation import Reuse
from pack.models.calibration import Calibration, CondLevels, KeySteps, Point
from pack.models.store import shipped_profiles
from pack.nodes._plan.auto import (
    ALWAYS,
    FAITHFUL,
    FAST,
    METHODS,
    NOISE,
    OFF,
    SCHEDULE,
    SHIFT,
    SHOWN,
    SPEED,
    START,
    TOLD,
    Run,
    Shelf,
    Wishes,
    auto_report,
    decide,
    key_steps_of,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/families.md"
NOTHING = Wishes(OFF, OFF, OFF, OFF, OFF)


def picks(facts, run, wishes=Wishes(), shelf=FRESH, start=None) -> dict[str, str]:  # noqa: B008 - frozen
    return {one.method: one.pick for one in decide(facts, run, wishes, shelf, start) if one.pick}


# What a fresh install uses of itself, with the node as it comes.
EXPECTED = {
    "SD 1.5": {SCHEDULE: "AYS SD 1.5"},
    "SD 1.5 with LCM": {},
    "SD 2.x v": {},
    "SDXL": {SCHEDULE: "AYS SDXL"},
    "SDXL, below native size": {SCHEDULE: "AYS SDXL"},
    "SDXL Turbo, Lightning": {},
    "SD3, SD3.5": {SCHEDULE: "auto"},
    "SD3, few steps": {SCHEDULE: "KL-optimal, c = 1.4"},
    "SD3.5 Large Turbo": {SCHEDULE: "auto"},
    "Flux": {SCHEDULE: "auto"},
    "Flux.2 klein": {SCHEDULE: "auto"},
    "Qwen-Image": {SCHEDULE: "auto"},
    "Wan": {SCHEDULE: "auto"},
    "AuraFlow": {SCHEDULE: "auto"},
    "demo UNet": {SCHEDULE: "Attune demo unet, dpmpp_2m, 8 steps"},
    "demo flow": {SCHEDULE: "Attune demo flow, euler, 8 steps", TOLD: "Attune demo flow, euler, 8 steps"},
    "unknown model": {},
}
# The same with the published files installed, every switch on 'wherever it fits' and speed on 'faithful'.
EXPECTED_EVERYTHING = {
    "SD 1.5": {
        SCHEDULE: "AYS SD 1.5", START: "oms_b_openclip_15_21", NOISE: "re-denoise", SPEED: "one block fresh, every 2",
    },
    "SD 1.5 with LCM": {START: "oms_b_openclip_15_21"},
    "SD 2.x v": {
        SCHEDULE: "KL-optimal, c = 1.4", START: "oms_b_openclip_15_21", NOISE: "re-denoise",
        SPEED: "one block fresh, every 2",
    },
    "SDXL": {
        SCHEDULE: "AYS SDXL", START: "oms_l_mixclip_xl", NOISE: "npnet-sdxl", SPEED: "one block fresh, every 2",
    },
    "SDXL, below native size": {
        SCHEDULE: "AYS SDXL", START: "oms_l_mixclip_xl", NOISE: "npnet-sdxl", SPEED: "one block fresh, every 3",
    },
    "SDXL Turbo, Lightning": {START: "oms_l_mixclip_xl", NOISE: "npnet-sdxl"},
    "SD3, SD3.5": {SCHEDULE: "auto", NOISE: "re-denoise", SPEED: "first block fresh, every 2"},
    "SD3, few steps": {SCHEDULE: "KL-optimal, c = 1.4", NOISE: "re-denoise"},
    "SD3.5 Large Turbo": {SCHEDULE: "auto"},
    "Flux": {SCHEDULE: "auto", NOISE: "re-denoise", SPEED: "first block fresh, every 2"},
    "Flux.2 klein": {SCHEDULE: "auto"},
    "Qwen-Image": {SCHEDULE: "auto", NOISE: "re-denoise", SPEED: "first block fresh, every 2"},
    "Wan": {SCHEDULE: "auto", NOISE: "re-denoise"},
    "AuraFlow": {SCHEDULE: "auto", NOISE: "re-denoise", SPEED: "first block fresh, every 2"},
    "demo UNet": {
        **EXPECTED["demo UNet"], START: "attune_demo.safetensors", NOISE: "attune_demo_npnet.safetensors",
    },
    "demo flow": {**EXPECTED["demo flow"], NOISE: "re-denoise"},
    "unknown model": {SCHEDULE: "KL-optimal, c = 1.4", NOISE: "re-denoise"},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_install_uses_what_is_shown_to_help_and_nothing_else(name):
    assert picks(FAMILIES[name].facts, FAMILIES[name].run) == EXPECTED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_on_demand_everything_that_fits_is_used(name):
    assert picks(FAMILIES[name].facts, FAMILIES[name].run, EVERYTHING, FULL) == EXPECTED_EVERYTHING[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_switched_off_nothing_is_used(name):
    assert picks(FAMILIES[name].facts, FAMILIES[name].run, NOTHING, FULL) == {}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wishes", [Wishes(), EVERYTHING, NOTHING], ids=["shown", "everything", "nothing"])
def test_every_method_is_answered_for_in_order_and_with_a_reason(name, wishes):
    decisions = decide(FAMILIES[name].facts, FAMILIES[name].run, wishes, FULL)
    assert [one.method for one in decisions] == METHODS
    assert all(one.why.endswith(".") for one in decisions)


# --- schedules ---


def fit(**changes) -> Calibration:
    made = {
        "solver": "euler", "prediction": "eps", "cfg": 6.0, "config_hash": "theirs",
        "alignments": (CondLevels("euler", (512, 512), (0.4, 4.0), (0.35, 3.8)),), **changes,
    }  # fmt: skip
    size = made.pop("resolution", (512, 512))
    return Calibration("mine", "a test", "ve", ("SD15",), size, (14.6, 4.0, 1.0, 0.4, 0.1, 0.0), "a test", **made)


def with_fits(**profiles) -> Shelf:
    return Shelf({**profiles, **shipped_profiles()})


EULER = Run(5, "euler", 7.0)


def test_a_fit_for_this_very_run_comes_before_the_published_table():
    assert picks(SD15, EULER, shelf=with_fits(mine=fit())) == {SCHEDULE: "mine", TOLD: "mine"}
    assert picks(SD15, EULER, shelf=with_fits(mine=fit(alignments=()))) == {SCHEDULE: "mine"}


@pytest.mark.parametrize(
    ("run", "facts", "profile", "said"),
    [
        (replace(EULER, solver="dpmpp_2m"), SD15, fit(), "'mine', is for euler"),
        (replace(EULER, steps=7), SD15, fit(), "'mine', is for 5 steps"),
        (replace(EULER, cfg=13.0), SD15, fit(), "'mine', is for cfg 6"),
        (EULER, replace(SD15, size=(512, 768)), fit(), "'mine', is for 512x512"),
    ],
)
def test_a_fit_that_just_misses_is_named_with_the_reason_and_the_table_is_used(run, facts, profile, said):
    schedule = decide(facts, run, Wishes(), with_fits(mine=profile))[0]
    assert schedule.pick == "AYS SD 1.5" and said in schedule.why


@pytest.mark.parametrize("changes", [{"config_hash": "another"}, {"prediction": "v"}])
def test_a_fit_for_another_network_is_not_even_mentioned(changes):
    schedule = decide(SD15, EULER, Wishes(), with_fits(mine=fit(**changes)))[0]
    assert schedule.pick == "AYS SD 1.5" and "mine" not in schedule.why


def test_of_fits_the_nearest_in_steps_is_taken():
    longer = replace(fit(), sigmas=(14.6, 9.0, 4.0, 1.0, 0.4, 0.1, 0.0))
    assert picks(SD15, replace(EULER, steps=6), shelf=with_fits(mine=fit(), longer=longer))[SCHEDULE] == "longer"


def test_of_fits_that_miss_the_one_that_misses_last_is_named():
    shelf = with_fits(solver=fit(solver="heun"), steps=replace(fit(), sigmas=(14.6, 1.0, 0.0)), cfg=fit(cfg=1.0))
    assert "'cfg', is for cfg 1" in decide(SD15, EULER, Wishes(), shelf)[0].why


def test_a_table_is_left_out_where_it_was_not_shown_or_does_not_fit_the_noise():
    assert picks(SD15, replace(EULER, solver="heun")) == {}
    assert picks(SD15, replace(EULER, steps=4)) == {}
    assert picks(SD15, replace(EULER, solver="heun"), Wishes(schedule=ALWAYS)) == {SCHEDULE: "AYS SD 1.5"}
    zero_snr = replace(SD15, model=replace(SD15.model, sigma_max=4518.0))
    assert picks(zero_snr, EULER) == {}
    assert picks(SD15, replace(EULER, solver="dpm_adaptive"), Wishes(schedule=ALWAYS)) == {}


def test_a_users_table_for_the_family_is_found():
    mine = replace(fit(), name="my table", families=("SD20",), sigmas=(14.6, 4.0, 1.0, 0.1), alignments=(), solver="")
    facts = replace(SD15, model=replace(SD15.model, families=("SD20",)))
    assert picks(facts, EULER, shelf=with_fits(**{"table.json": mine})) == {SCHEDULE: "table.json"}


# --- one more step ---


def test_one_more_step_is_used_where_the_start_leaks_and_a_module_and_its_prompt_are_there():
    run = Run(20, "dpmpp_2m", 7.0, prompt_width=1024)
    assert picks(SD15, run, shelf=FULL)[START] == "oms_b_openclip_15_21"
    assert picks(SDXL, run, shelf=FULL)[START] == "oms_b_openclip_xl"
    assert picks(SDXL, replace(run, prompt_width=2048), shelf=FULL)[START] == "oms_l_mixclip_xl"
    assert START not in picks(SD15, replace(run, denoise=0.6), shelf=FULL)
    assert START not in picks(replace(SD15, model=replace(SD15.model, sigma_max=4518.0)), run, shelf=FULL)
    missing = decide(SD15, replace(run, prompt_width=768), Wishes(), FULL)[3]
    assert "'positive' is 768 wide" in missing.why and "OpenCLIP-H" in missing.enable


def test_a_stock_schedule_that_starts_low_leaks_on_the_demo_model_too():
    case = FAMILIES["demo UNet"]
    off = Wishes(schedule=OFF)
    assert picks(case.facts, case.run, off, start=14.6) == {}
    assert picks(case.facts, case.run, off, start=4.1) == {START: "attune_demo.safetensors"}


# --- noise shift, golden noise, speed ---


def shift(size) -> Calibration:
    curve = CondLevels("", size, (0.4, 4.0), (0.35, 3.8))
    return Calibration(
        "small", "noise shift", "ve", ("SD15",), (512, 512), (), "a test", kind="noise_shift", prediction="eps",
        config_hash="theirs", alignments=(curve,),
    )  # fmt: skip


def test_a_noise_shift_waits_for_its_switch_and_changes_nothing_at_the_native_size():
    small = replace(SD15, size=(256, 256), area=32 * 32)
    shelf = Shelf({"small.json": shift((256, 256))})
    shown, always = Wishes(schedule=OFF), Wishes(schedule=OFF, noise_shift=ALWAYS)
    assert picks(small, EULER, shown, shelf) == {}
    assert "small.json" in decide(small, EULER, shown, shelf)[2].why
    assert picks(small, EULER, always, shelf) == {SHIFT: "small.json"}
    assert picks(SD15, EULER, always, shelf) == {}
    assert picks(replace(small, size=None), EULER, always, shelf) == {}


def test_of_calibrations_that_differ_in_their_loras_the_models_own_is_taken():
    """Whatever their order; on a model without LoRAs the one that was fitted without."""
    small = replace(SD15, size=(256, 256), area=32 * 32)
    points = (Point(Reuse(1, 8, True), (0, 2), 1.5, 50.0),)
    reuse = replace(fit(), kind="encoder_propagation", key_steps=KeySteps(12, "euler", fit().sigmas, points))
    wishes = Wishes(noise_shift=ALWAYS, speed=FAITHFUL)
    for has in ("none", "a LoRA"):
        facts = replace(small, model=replace(small.model, patches=has))
        for order in (("none", "a LoRA", "another"), ("another", "a LoRA", "none")):
            made = {"fit": fit(resolution=(256, 256)), "shift": shift((256, 256)), "reuse": reuse}
            shelf = Shelf({f"{key} {one}": replace(value, patches=one) for key, value in made.items() for one in order})
            got = picks(facts, EULER, wishes, shelf)
            assert {got[SCHEDULE], got[SHIFT], got[SPEED]} == {f"fit {has}", f"shift {has}", f"reuse {has}"}


def test_a_calibration_of_propagation_is_for_its_network_weights_solver_and_steps():
    points = (Point(Reuse(1, 8, True), (0, 2), 1.5, 50.0),)
    reuse = replace(
        fit(weights_hash="w"), kind="encoder_propagation", key_steps=KeySteps(12, "euler", fit().sigmas, points)
    )
    facts = replace(SD15, model=replace(SD15.model, weights_hash="w"))
    wishes, shelf = Wishes(schedule=OFF, speed=FAITHFUL), Shelf({"mine": reuse})
    assert picks(facts, EULER, wishes, shelf) == {SPEED: "mine"}
    for other in (
        (facts, replace(EULER, solver="heun")), (facts, replace(EULER, steps=9)), (facts, replace(EULER, cfg=15.0)),
        *((replace(facts, model=replace(facts.model, **{key: "x"})), EULER) for key in ("config_hash", "weights_hash")),
        (replace(facts, network="transformer", blocks=12), EULER),
    ):  # fmt: skip
        assert picks(*other, wishes, shelf).get(SPEED) != "mine"


def test_redenoising_needs_guidance():
    wishes = Wishes(schedule=OFF, golden_noise=ALWAYS)
    assert picks(SD15, EULER, wishes) == {NOISE: "re-denoise"}
    assert picks(SD15, replace(EULER, cfg=1.0), wishes) == {}
    assert picks(SD15, replace(EULER, denoise=0.5), wishes) == {}
    assert picks(FAMILIES["Flux"].facts, FAMILIES["Flux"].run, wishes) == {NOISE: "re-denoise"}


@pytest.mark.parametrize(
    ("family", "run", "wish", "pick"),
    [
        ("SD 1.5", Run(50, "euler", 7.0), FAITHFUL, "one block fresh, every 5"),
        ("SD 1.5", Run(20, "euler", 7.0), FAITHFUL, "one block fresh, every 2"),
        ("SD 1.5", Run(19, "euler", 7.0), FAITHFUL, ""),
        ("SD 1.5", Run(20, "dpmpp_2m", 7.0), FAITHFUL, "one block fresh, every 2"),
        ("SD 1.5", Run(15, "dpmpp_2m", 7.0), FAST, ""),
        ("SD3, SD3.5", Run(28, "euler", 4.5), FAITHFUL, "first block fresh, every 2"),
        ("demo flow", Run(20, "euler", 3.0), FAST, ""),
        ("SD 1.5", Run(25, "euler_ancestral", 7.0), FAITHFUL, "one block fresh, every 2"),
        ("SDXL", Run(25, "euler_ancestral", 7.0), FAITHFUL, "two levels fresh, every 3"),
        ("SDXL", Run(30, "dpmpp_2m_sde_gpu", 7.0), FAITHFUL, "two levels fresh, every 3"),
        ("SDXL", Run(20, "dpmpp_2m_sde", 7.0), FAITHFUL, ""),
        ("SDXL", Run(25, "euler", 7.0), FAITHFUL, "one block fresh, every 3"),
    ],
)
def test_key_steps_are_those_whose_fidelity_was_measured(family, run, wish, pick):
    decision = decide(FAMILIES[family].facts, run, Wishes(speed=wish), FRESH)[5]
    assert decision.pick == pick
    assert key_steps_of(decision.pick) == ((pick[:-9], int(pick[-1])) if pick else None)


def test_a_calibration_of_this_network_comes_first_and_both_speeds_mean_its_points():
    points = (Point(Reuse(1, 8, True), (0, 2), 1.5, 50.0), Point(Reuse(1, 8, True), (0, 3), 2.5, 38.0))
    mine = replace(
        fit(), kind="encoder_propagation", sigmas=(14.6, 4.0, 1.0, 0.4, 0.1, 0.0),
        key_steps=KeySteps(12, "euler", (14.6, 4.0, 1.0, 0.4, 0.1, 0.0), points),
    )  # fmt: skip
    faithful, fast = (decide(SD15, EULER, Wishes(speed=wish), with_fits(mine=mine))[5] for wish in (FAITHFUL, FAST))
    assert faithful.pick == fast.pick == "mine"
    assert "1.50x at 50.0 dB" in faithful.why and "2.50x at 38.0 dB" in fast.why


def test_forecasts_are_taken_for_their_own_levels_alone_and_serve_every_network():
    levels = (14.6, 4.0, 1.0, 0.4, 0.1, 0.0)
    points = (Point(Reuse(0, 1), (0, 1, 4), 5 / 3, 50.0, (), ((), (), (0.1, 0.1, 0.1), (0.1,) * 3, ()), (0.0,) * 5),)
    mine = replace(fit(), kind="step_forecast", sigmas=levels, key_steps=KeySteps(1, "euler", levels, points))
    picked = lambda facts, run, schedule: decide(
        facts, run, Wishes(speed=FAITHFUL, schedule=schedule), with_fits(mine=mine)
    )[5].pick
    here = replace(EULER, steps=5, levels=levels)
    assert picked(SD15, here, OFF) == "mine"
    assert picked(replace(SD15, network=""), here, OFF) == "mine"
    assert picked(SD15, replace(here, levels=(*levels[:3], 0.5, *levels[4:])), OFF) != "mine"
    assert picked(SD15, replace(here, levels=()), OFF) != "mine"
    assert decide(SD15, here, Wishes(), with_fits(mine=mine))[0].pick and picked(SD15, here, SHOWN) != "mine"


# --- the report and the page ---


def test_the_report_names_what_is_used_first_and_then_what_would_enable_the_rest():
    case = FAMILIES["SD 1.5"]
    said = auto_report(case.facts, case.run, decide(case.facts, case.run, Wishes(), FRESH), ["x.json is damaged."])
    lines = said.splitlines()
    assert lines[0] == "SD15, sigma up to 14.61; 512x512; 20 steps of dpmpp_2m at cfg 7."
    assert lines[1].startswith("+ schedule: AYS SD 1.5.") and lines[-1] == "! x.json is damaged."
    assert any("oms_b_openclip_15_21 in models/one_more_step" in line for line in lines if line.startswith("- "))
    off = auto_report(case.facts, case.run, decide(case.facts, case.run, NOTHING, FRESH))
    assert "The levels are those of 'stock'." in off


def table(wishes, shelf, notes: list[str]) -> str:
    """One row a family; a method that is left out points to its reason."""
    rows = [f"| model | run | {' | '.join(METHODS)} |", "|---" * (2 + len(METHODS)) + "|"]
    for name, case in FAMILIES.items():
        cells = []
        for one in decide(case.facts, case.run, wishes, shelf):
            why = one.why + (f" *To have it: {one.enable}.*" if one.enable else "")
            if not one.pick and why not in notes:
                notes.append(why)
            cells.append(one.pick or f"– [{notes.index(why) + 1}]")
        size = "x".join(map(str, case.facts.size))
        run = f"{size}, {case.run.steps} steps {case.run.solver}, cfg {case.run.cfg:g}"
        rows.append(f"| {name} | {run} | {' | '.join(cells)} |")
    return "\n".join(rows)


def page() -> str:
    notes: list[str] = []
    fresh, full = table(Wishes(), FRESH, notes), table(EVERYTHING, FULL, notes)
    listed = "\n".join(f"[{i}] {note}  " for i, note in enumerate(notes, 1))
    return (
        f"### As it comes, on a fresh install\n\n{fresh}\n\n"
        "### Every switch on 'wherever it fits', speed on 'faithful', the published files installed\n\n"
        f"{full}\n\n{listed}\n"
    )


def test_the_page_says_what_the_function_decides():
    marks = r"(<!-- decided: .*? -->\n\n).*?(<!-- end -->)"
    text = PAGE.read_text("utf-8")
    if os.environ.get("ATTUNE_WRITE"):
        text = re.sub(marks, lambda found: found[1] + page() + "\n" + found[2], text, flags=re.S)
        PAGE.write_text(text, "utf-8")
    assert page() in text
