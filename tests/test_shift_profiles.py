"""Noise shifts as profiles: which curve a size gets, what is refused, what continues an unfinished fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pack.kernels.gate import Verdict
from pack.kernels.noise_shift import SHIFT_PRESETS, Shift
from pack.kernels.space import NoiseSpace
from pack.models.calibration import NOISE_SHIFT, CondLevels, ModelIdentity, refuse_unfit
from pack.models.store import load_profile, save_profile, update_profile
from pack.nodes._draw.plots import draw_shift
from pack.nodes._plan.noise_shift import (
    continues,
    noise_shift_profile,
    parse_sizes,
    shift_for,
    shift_plan,
    shift_report,
)

MODEL = ModelIdentity(("SD3",), "flow", 0.001, 1.0, "flow", "abc")
HOW = {"preset": "quick", "seed": 0, "pictures": 8}
AT = (0.1, 0.3, 0.5, 0.7, 0.9)


def verdict(accepted: bool, mean: float, t: float) -> Verdict:
    return Verdict(accepted, 1.0, 1 + mean, mean, mean, 1.0, t, -4.5, 0.8, 0.01, 8)


def shifted(offset: float) -> Shift:
    told = tuple(NoiseSpace("flow").at_log_ratio(torch.logit(torch.tensor(AT).double()) + offset).tolist())
    return Shift(AT, told, verdict(True, -0.03, -9.0), 10.0, (0.9,) * 5)


def refused() -> Shift:
    return Shift(AT, AT, verdict(False, 0.001, 1.0), 1e3, (1.0,) * 5)


def profile(**sizes: float):
    shifts = {tuple(map(int, key[1:].split("x"))): shifted(offset) for key, offset in sizes.items()}
    return noise_shift_profile(MODEL, (128, 128), shifts, None, **HOW)


SMALL = {"_64x64": 0.4, "_96x96": 0.2}


def offset(one, size, strength=1.0) -> float:
    return shift_for(one, size, strength)[0].offset_at(0.0)


def test_a_calibrated_size_gets_its_own_curve_at_the_strength_asked():
    one = profile(**SMALL)
    assert offset(one, (64, 64)) == pytest.approx(0.4) and offset(one, (96, 96), 0.5) == pytest.approx(0.1)
    said = shift_for(one, (64, 64))[1]
    assert "64x64 is calibrated, the network is told 1.49 times the true sigma / (1 - sigma)." in said
    assert shift_for(one, (64, 64), 0.0)[0].is_identity


def test_a_size_between_is_interpolated_in_the_logarithm_of_its_pixels_and_says_so():
    one = profile(**SMALL)
    share = math.log(80 * 80 / 64**2) / math.log(96**2 / 64**2)
    got, said = shift_for(one, (80, 80))
    assert got.offset_at(0.0) == pytest.approx(0.4 * (1 - share) + 0.2 * share)
    assert (
        f"{1 - share:.0%} of the curve of 64x64 and {share:.0%} of that of 96x96" in said and "not calibrated" in said
    )
    assert offset(one, (112, 112)) == pytest.approx(0.2 * math.log(128 / 112) / math.log(128 / 96))  # towards native


def test_at_and_above_the_native_size_nothing_is_changed_and_below_all_sizes_the_smallest_counts():
    one = profile(**SMALL)
    for size in ((128, 128), (256, 256), (128, 136)):
        got, said = shift_for(one, size)
        assert got.is_identity and "nothing is changed" in said
    got, said = shift_for(one, (32, 32))
    assert got.offset_at(0.0) == pytest.approx(0.4) and "not calibrated, so it gets the curve of 64x64" in said


def test_of_sizes_with_equal_pixels_the_nearest_aspect_ratio_counts():
    one = profile(_128x32=0.1, _64x64=0.2, _32x128=0.3)
    assert offset(one, (128, 32)) == pytest.approx(0.1)
    assert offset(one, (256, 16)) == pytest.approx(0.1)
    assert offset(one, (16, 256)) == pytest.approx(0.3)
    assert offset(one, (64, 48)) == pytest.approx(0.2) and offset(one, (40, 90)) == pytest.approx(0.3)


def test_a_calibrated_native_size_counts_as_measured():
    assert offset(profile(_64x64=0.4, _128x128=0.05), (128, 128)) == pytest.approx(0.05)


def test_sizes_are_added_to_a_profile_in_order_and_survive_the_file(tmp_path):
    one = noise_shift_profile(MODEL, (128, 128), {(96, 96): shifted(0.2)}, None, **HOW)
    both = noise_shift_profile(MODEL, (128, 128), {(64, 64): refused()}, one, **HOW)
    assert [a.resolution for a in both.alignments] == [(64, 64), (96, 96)]
    assert both.metrics["96x96"]["accepted"] and not both.metrics["64x64"]["accepted"]
    path = save_profile(one, tmp_path, "shift")
    assert update_profile(path, one, both) == path
    assert load_profile(path) == both
    failed = replace(refused(), verdict=verdict(False, math.nan, math.nan))
    one = noise_shift_profile(MODEL, (128, 128), {(96, 96): failed}, None, **HOW)
    assert load_profile(save_profile(one, tmp_path)) == one


@pytest.mark.parametrize(
    "other",
    [
        {"native": (64, 64)}, {"seed": 1}, {"data": "other pictures"}, {"preset": "normal"},
        *({"model": replace(MODEL, **{key: "x"})} for key in ("config_hash", "weights_hash", "patches", "prediction")),
    ],
    ids=str,
)  # fmt: skip
def test_a_fit_goes_on_with_the_same_model_pictures_and_settings_alone(other):
    one = noise_shift_profile(MODEL, (128, 128), {(96, 96): shifted(0.2)}, None, data="these", **HOW)
    asked = {"model": MODEL, "native": (128, 128), "data": "these", **HOW}
    assert continues(one, **asked) and not continues(one, **(asked | other))


def test_another_kind_architecture_noise_or_prediction_is_refused_by_name():
    one = profile(**SMALL)
    refuse_unfit(one, MODEL, "Take another.", (NOISE_SHIFT,))
    schedule = replace(one, kind="schedule", sigmas=(1.0, 0.0))
    for wrong, model, words in (
        (schedule, MODEL, "is a schedule, but a noise shift is needed here. Take another"),
        (one, replace(MODEL, families=("Flux",)), "another architecture: SD3, but this MODEL is Flux.* Take another"),
        (one, replace(MODEL, space="ve", sigma_max=14.6), "flow models"),
        (one, replace(MODEL, prediction="eps"), "flow prediction, but this MODEL has eps"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_unfit(wrong, model, "Take another.", (NOISE_SHIFT,))


def test_sizes_are_read_as_people_write_them():
    assert parse_sizes("512x512, 768X512\n640 × 640; 512, 512x512,", 8) == [(512, 512), (768, 512), (640, 640)]
    assert parse_sizes(" ", 8) == []
    for text, words in (
        ("512by512", "such as 512x512, 768x512, but it has '512by512'"), ("-8x8", "has '-8x8'"), ("1x2x3", "1x2x3"),
        ("100x512", "multiples of 8 up to 16384"), ("0x8", "multiples of 8"), ("99999999x8", "up to 16384"),
        (",".join(f"{8 * n}x8" for n in range(1, 40)), "at most 24 sizes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            parse_sizes(text, 8)


def test_the_report_says_what_was_kept_and_what_was_not():
    space = NoiseSpace("flow")
    assert "t -9.0 (needed -4.5): kept" in shift_report((64, 64), shifted(0.4), space)
    assert "nothing to gain" in shift_report((64, 64), refused(), space)
    said = shift_plan([(64, 64), (96, 96)], SHIFT_PRESETS["quick"], 6)
    assert (
        "6 pictures, 8 noise levels, 7 candidates, 2 noises: 672 evaluations a size" in said and "would use 8" in said
    )
    assert SHIFT_PRESETS["quick"].evaluations <= 900


@pytest.mark.parametrize("space", ["flow", "ve"])
def test_the_plot_shows_every_size_and_the_identity(space):
    many = profile(**{f"_{8 * n}x64": 0.05 * n for n in range(1, 13)})
    if space == "ve":
        aligned = (CondLevels("", (64, 64), (0.1, 1.0, 10.0), (0.12, 1.5, 12.0)),)
        many = replace(many, space="ve", alignments=aligned)
    picture = draw_shift(many)
    assert picture.size == (960, 600) and len(picture.getcolors(10**6)) > 20
    flat = draw_shift(noise_shift_profile(MODEL, (128, 128), {(64, 64): refused()}, None, **HOW))
    assert flat.tobytes() != picture.tobytes()
