"""From settings and calibrations to key steps, and the file that a calibration lives in."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from pack.kernels.propagation import Costs, Reuse, speedup
from pack.models.calibration import Calibration, KeySteps, Point
from pack.models.store import load_profile, save_profile
from pack.nodes._plan.propagation import (
    ENCODER_REUSED,
    ONE,
    TOP_LEVEL,
    TRANSFORMER_PARTS,
    TWO_LEVELS,
    UNET_PARTS,
    ReuseSettings,
    block_reuse_by_name,
    calibrated_point,
    choose,
    choose_blocks,
    chosen_point,
    part_of_transformer,
    part_of_unet,
    reuse_by_name,
    why_whole,
)

STEPS = 20
SIGMAS = [14 * (1 - i / STEPS) ** 2 for i in range(STEPS + 1)]
TIMES = [1 - i / STEPS for i in range(STEPS)]
COSTS = Costs((0.02, 0.08, 0.1, 0.1), 0.05, (0.15, 0.15, 0.2, 0.15))
POINTS = (
    Point(Reuse(2, 2, True), (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19), 1.4, 51.0),
    Point(Reuse(2, 2, True), (0, 3, 6, 9, 12, 15, 18), 1.7, 46.0),
    Point(Reuse(1, 3, True), (0, 5, 10, 15), 2.5, 38.0),
)
FIT = KeySteps(4, "euler", tuple(SIGMAS), POINTS)


def chosen(fresh_noise=False, **settings):
    return choose(
        ReuseSettings(**{"keep_last": 2, **settings}), SIGMAS, TIMES, COSTS, levels=(2,), fresh_noise=fresh_noise
    )


def test_names_of_parts_are_members_of_one_family():
    assert [reuse_by_name(name, False, 12, (3, 6, 9)) for name in UNET_PARTS] == [
        Reuse(3, 9),
        Reuse(6, 6),
        Reuse(2, 10),
        Reuse(1, 11),
        Reuse(0, 0),
    ]
    assert [block_reuse_by_name(name, True, 28) for name in TRANSFORMER_PARTS] == [
        Reuse(1, 28, True), Reuse(3, 25, True), Reuse(0, 18, True),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="A transformer of 2 blocks has nothing to reuse with 'first and last"):
        block_reuse_by_name(TRANSFORMER_PARTS[1], True, 2)


def test_automatic_is_the_first_part_and_a_part_of_the_other_kind_is_refused():
    assert part_of_unet("automatic") == TOP_LEVEL and part_of_transformer("automatic") == TRANSFORMER_PARTS[0]
    assert chosen(mode="uniform").reuse == reuse_by_name(TOP_LEVEL, True, 4, (2,))
    said = (
        r"'first block fresh' is a part of a transformer, but this MODEL is a UNet: set 'reuse' to one of 'automatic', "
    )
    with pytest.raises(ValueError, match=said):
        part_of_unet(TRANSFORMER_PARTS[0])
    with pytest.raises(ValueError, match="'encoder reused' is a part of a UNet, but this MODEL is a transformer"):
        part_of_transformer(ENCODER_REUSED)


def test_the_published_mode_ignores_what_the_paper_does_not_have():
    choice = chosen(mode="published keys", reuse=TOP_LEVEL, forecast=True, keep_last=5)
    assert choice.reuse == Reuse(0, 0, False) and choice.keep_last == 0
    assert choice.keys == {0, 1, 2, 4, 6, 10, 14}


@pytest.mark.parametrize("reuse", UNET_PARTS)
@pytest.mark.parametrize("speed", [1.2, 1.4])
def test_a_speed_target_is_reached_with_as_many_key_steps_as_it_allows(reuse, speed):
    choice = chosen(mode="speed target", speed=speed, reuse=reuse)
    share, keys = COSTS.of_step(choice.reuse), len(choice.keys)
    assert speedup(STEPS, keys, share) >= speed > speedup(STEPS, keys + 1, share)
    assert {STEPS - 2, STEPS - 1} <= choice.keys


def test_a_part_that_cannot_reach_the_speed_gives_way_to_a_cheaper_one_or_is_refused():
    assert chosen(mode="speed target", speed=3.0, reuse=TOP_LEVEL).reuse == reuse_by_name(ONE, True, 4, (2,))
    with pytest.raises(
        ValueError, match=r"cannot run 2 times faster over 20 steps.*the limit is 1\.\d+\. Lower 'speed'"
    ):
        chosen(mode="speed target", speed=2.0, reuse=ENCODER_REUSED)


def test_new_noise_is_never_hidden_from_the_network():
    choice = chosen(fresh_noise=True, mode="published keys")
    assert choice.reuse == Reuse(2, 2, False) and "adds noise" in choice.said
    assert chosen(fresh_noise=True, mode="uniform", reuse=ONE).reuse.fresh == 1


DEEP = Costs((0.0, 0.02, 0.0, 0.08, 0.0, 0.3), 0.1, (0.2, 0.15, 0.1, 0.03, 0.02, 0.0))  # three levels, as SDXL's


@pytest.mark.parametrize(
    ("costs", "settings", "part"),
    [
        (DEEP, {"fresh_noise": True}, TWO_LEVELS),
        (DEEP, {"fresh_noise": True, "reuse": TOP_LEVEL}, TOP_LEVEL),  # as the user says
        (DEEP, {}, TOP_LEVEL),  # a path without new noise loses little
        (DEEP, {"mode": "speed target", "speed": 1.6}, TWO_LEVELS),
        (DEEP, {"mode": "speed target", "speed": 2.5}, TOP_LEVEL),  # two levels would leave too few key steps
        (Costs((0.0, 0.1, 0.0, 0.2, 0.0, 0.05), 0.05, (0.05, 0.05, 0.2, 0.2, 0.1, 0.0)), {"fresh_noise": True}, TOP_LEVEL),
    ],
)  # fmt: skip
def test_automatic_computes_two_levels_where_most_of_the_work_lies_below_them(costs, settings, part):
    fresh_noise = settings.get("fresh_noise", False)
    given = {"mode": "uniform", "keep_last": 2, **{k: v for k, v in settings.items() if k != "fresh_noise"}}
    choice = choose(ReuseSettings(**given), SIGMAS, TIMES, costs, levels=(2, 4), fresh_noise=fresh_noise)
    assert choice.reuse == reuse_by_name(part, True, 6, (2, 4))


def test_two_levels_of_a_network_that_has_fewer_are_all_it_has():
    assert reuse_by_name(TWO_LEVELS, True, 4, (2,)) == reuse_by_name(TOP_LEVEL, True, 4, (2,)) == Reuse(2, 2, True)


def test_a_calibration_serves_speeds_and_fidelity():
    assert calibrated_point(FIT) is POINTS[1]  # the fastest within 45 dB
    assert calibrated_point(replace(FIT, points=POINTS[2:])) is POINTS[2]
    assert chosen(mode="calibrated profile", calibration=FIT).keys == set(POINTS[1].keys)
    fast = chosen(mode="speed target", speed=1.8, calibration=FIT)
    assert fast.keys == set(POINTS[2].keys) and fast.reuse == POINTS[2].reuse and "2.50x at 38.0 dB" in fast.said
    with pytest.raises(ValueError, match=r"fastest setting is 2\.50 times faster, but 'speed' is 3"):
        chosen(mode="speed target", speed=3.0, calibration=FIT)
    with pytest.raises(ValueError, match="needs a profile"):
        chosen(mode="calibrated profile")


def test_a_wanted_fidelity_takes_the_fastest_setting_that_proved_it_or_the_whole_run():
    wanted = lambda db, mode="calibrated profile": ReuseSettings(mode, speed=1.8, calibration=FIT, fidelity=db)
    at = {db: chosen_point(wanted(db), FIT) for db in (0, 30, 38, 46, 46.1, 51, 52)}
    assert at == {0: POINTS[1], 30: POINTS[2], 38: POINTS[2], 46: POINTS[1], 46.1: POINTS[0], 51: POINTS[0], 52: None}
    assert chosen_point(wanted(52, "speed target"), FIT) is POINTS[2]  # the other side of the slider
    assert why_whole(wanted(51)) == why_whole(wanted(52, "speed target")) == ""
    assert re.search(
        r"whole network: .* kept 51\.0 dB at 1\.40x, less than the 'fidelity' of 52 dB", why_whole(wanted(52))
    )


def test_transformers_choose_alike():
    shares = (0.25,) * 4
    choice = choose_blocks(ReuseSettings(reuse=TRANSFORMER_PARTS[0]), SIGMAS, TIMES, Costs(shares, 0.0, shares))
    assert choice.reuse == Reuse(1, 4, True) and choice.keys == set(range(0, STEPS, 3))
    assert Costs(shares, 0.0, shares).of_step(choice.reuse) == 0.25


# --- files ---


def profile(**changed) -> Calibration:
    fields = {
        "name": "test", "method": "measured", "space": "ve", "families": ("SD15",), "resolution": (512, 512),
        "sigmas": FIT.sigmas, "source": "test", "kind": "encoder_propagation", "solver": "euler", "key_steps": FIT,
        **changed,
    }  # fmt: skip
    return Calibration(**fields)


def test_a_calibration_comes_back_from_its_file(tmp_path):
    loaded = load_profile(save_profile(profile(), tmp_path))
    assert loaded == profile() and loaded.id == profile().id
    assert loaded.id != profile(key_steps=replace(FIT, points=POINTS[:2])).id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 0}, '"blocks" must be'),
        ({"blocks": 2}, r'"points"\[0\] must fit a network of 2 blocks'),
        ({"points": []}, '"points" must list'),
        ({"points": [{}]}, r'"points"\[0\] must fit'),
        ({"kind": "block_propagation"}, r'"points"\[0\] must fit'),
        ({"keys": [0, 20]}, r'"keys" must list ascending steps below 20'),
        ({"keys": [1, 2]}, '"keys" must list'),
        ({"keys": [0, 2, 2]}, '"keys" must list'),
        ({"speed": 0.5}, '"speed" must be at least 1'),
        ({"psnr": "45"}, '"psnr" must be a number'),
        ({"sigmas": []}, '"sigmas" must list'),
    ],
)
def test_a_damaged_calibration_is_refused_by_the_field(tmp_path, change, message):
    path = save_profile(profile(), tmp_path)
    fields = json.loads(path.read_text())
    del fields["id"]
    for key, value in change.items():
        (fields if key in ("blocks", "points", "kind", "sigmas") else fields["points"][0])[key] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_profile(path)
