"""A profile on a model: levels, shift, map, and every refusal in words that name both sides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pack.kernels.ays import kl_optimal
from pack.kernels.propagation import Reuse
from pack.kernels.schedules import check_sigmas, for_denoise
from pack.kernels.space import NoiseSpace
from pack.models.calibration import (
    PROPAGATION,
    Calibration,
    CondLevels,
    KeySteps,
    ModelIdentity,
    Point,
    conditioning_map,
    fitted,
    misfits,
    refuse_unfit,
)
from pack.models.store import shipped_profiles
from pack.nodes._plan.named_schedules import resample_profile, schedule
from pack.nodes._plan.profile_on_model import DENOISE_MODES, apply_profile

SD15 = ModelIdentity(("SD15",), "ve", 0.0292, 14.6146, "eps", "aaaa")
SD3 = ModelIdentity(("SD3",), "flow", 0.003, 1.0, "flow", "bbbb")
ALIGNED = CondLevels("euler", (512, 512), (0.7, 3.0, 14.6), (0.6, 2.5, 13.9))
FITTED = Calibration(
    "mine", "tuner", "ve", ("SD15",), (512, 512), (14.6146, 3.0, 0.7, 0.2, 0.0), "tuned", solver="euler", cfg=7.0,
    prediction="eps", config_hash="aaaa", alignments=(ALIGNED,),
)  # fmt: skip
FLOW = Calibration("mine", "tuner", "flow", ("SD3",), (1024, 1024), (1.0, 0.8, 0.5, 0.0), "tuned")


def said(applied):
    return " ".join(applied.report)


def test_the_native_run_is_the_profile_to_the_bit_and_a_fresh_tensor():
    one, other = apply_profile(FITTED, SD15), apply_profile(FITTED, SD15)
    assert torch.equal(one.sigmas, torch.tensor(FITTED.sigmas)) and one.sigmas.dtype == torch.float32
    one.sigmas.fill_(9)  # as uni_pc writes into what it is given
    assert torch.equal(other.sigmas, apply_profile(FITTED, SD15).sigmas)


@pytest.mark.parametrize("mode", DENOISE_MODES)
@pytest.mark.parametrize("profile", [FITTED, shipped_profiles()["AYS SD 1.5"]], ids=["fitted", "published"])
@pytest.mark.parametrize("steps", [1, 4, 13])
def test_full_denoise_is_the_same_in_every_mode(mode, profile, steps):
    sigmas = apply_profile(profile, SD15, steps, mode=mode).sigmas
    assert torch.equal(sigmas, resample_profile(profile, steps).float())


def test_the_modes_keep_what_they_promise():
    exact, comfy, ays = (apply_profile(FITTED, SD15, 8, 0.6, mode).sigmas for mode in DENOISE_MODES)
    assert len(exact) == len(comfy) == 9 and len(ays) == 6
    assert torch.equal(comfy, for_denoise(lambda n: resample_profile(FITTED, n), 8, 0.6).float())
    assert torch.equal(ays, resample_profile(FITTED, 8)[-6:].float())
    torch.testing.assert_close(exact[0], resample_profile(FITTED, 40)[16].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("mode", "denoise"), [("ays", 0.05), ("exact", 0.0), ("comfy", 0.0)])
def test_no_step_is_said(mode, denoise):
    applied = apply_profile(FITTED, SD15, 8, denoise, mode)
    assert applied.sigmas.numel() == 0 and "the latent comes back as it is" in said(applied)


def test_a_published_profile_is_what_the_scheduler_node_gives():
    profile = shipped_profiles()["AYS SD 1.5"]
    for denoise in (1.0, 0.5):
        want = schedule("AYS SD 1.5", SD15, 12, denoise)[0]
        assert torch.equal(apply_profile(profile, SD15, 12, denoise, "comfy").sigmas, want)


@pytest.mark.parametrize(("profile", "model"), [(FITTED, SD15), (FLOW, SD3)], ids=["ve", "flow"])
@pytest.mark.parametrize("side", [256, 512, 2048])
@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_shift_moves_inner_levels_with_the_size_and_keeps_both_ends(profile, model, side, denoise):
    plain = apply_profile(profile, model, 9, denoise)
    shifted = apply_profile(profile, model, 9, denoise, policy="shift", resolution=(side, side))
    check_sigmas(shifted.sigmas)
    inner = slice(1 if denoise == 1 else 0, -1)
    if side == profile.resolution[0]:
        assert torch.equal(shifted.sigmas, plain.sigmas)
    elif side > profile.resolution[0]:
        assert (shifted.sigmas[inner] > plain.sigmas[inner]).all()
    else:
        assert (shifted.sigmas[inner] < plain.sigmas[inner]).all()
    assert float(shifted.sigmas[-1]) == 0 and float(shifted.sigmas[0]) <= model.sigma_max * (1 + 1e-6)


def test_the_shift_of_a_flow_schedule_is_sd3s():
    shifted = apply_profile(FLOW, SD3, policy="shift", resolution=(2048, 2048)).sigmas
    s = torch.tensor(FLOW.sigmas)
    torch.testing.assert_close(shifted, 2 * s / (1 + s))


def test_a_size_within_a_tenth_is_the_same():
    for policy in ("shift", "strict", "ignore"):
        applied = apply_profile(FITTED, SD15, policy=policy, resolution=(544, 480))
        assert torch.equal(applied.sigmas, torch.tensor(FITTED.sigmas)) and "made at" not in said(applied)


def test_strict_refuses_another_size_and_ignore_says_it():
    with pytest.raises(ValueError, match="'mine' was made at 512x512, but the latent is 1024x768"):
        apply_profile(FITTED, SD15, policy="strict", resolution=(1024, 768))
    assert "made at 512x512, but the latent is 1024x768" in said(apply_profile(FITTED, SD15, resolution=(1024, 768)))


@pytest.mark.parametrize("policy", ["strict", "shift"])
def test_a_policy_that_needs_the_size_asks_for_the_latent(policy):
    with pytest.raises(ValueError, match=f"'{policy}', which needs the picture's size: connect 'latent'"):
        apply_profile(FITTED, SD15, policy=policy)


def test_the_map_is_the_alignment_bound_to_its_solver():
    applied = apply_profile(FITTED, SD15, strength=0.5)
    assert applied.conditioning == conditioning_map(FITTED, ALIGNED, 0.5) and applied.solver == "euler"
    assert "with euler only" in said(applied)


def test_strength_zero_has_no_map():
    applied = apply_profile(FITTED, SD15, strength=0.0)
    assert applied.conditioning is None and "'strength' is 0" in said(applied)


def test_another_parameterisation_keeps_the_schedule_and_skips_the_map():
    applied = apply_profile(FITTED, replace(SD15, prediction="v"))
    assert applied.conditioning is None and torch.equal(applied.sigmas, torch.tensor(FITTED.sigmas))
    assert "timestep alignment skipped: made for eps prediction, but this MODEL has v" in said(applied)


SHIFT = Calibration(
    "shift", "noise_shift", "flow", ("SD3",), (1024, 1024), (), "fitted", kind="noise_shift", prediction="flow",
    alignments=(CondLevels("", (512, 512), (0.5,), (0.55,)),),
)  # fmt: skip
REUSE = replace(
    FITTED, kind="encoder_propagation", name="reuse", alignments=(),
    key_steps=KeySteps(12, "euler", FITTED.sigmas, (Point(Reuse(1, 8, True), (0, 2), 1.5, 50.0),)),
)  # fmt: skip


@pytest.mark.parametrize(("profile", "model"), [(SHIFT, SD3), (REUSE, SD15)], ids=["noise shift", "propagation"])
def test_what_is_no_schedule_is_refused_where_a_schedule_is_needed(profile, model):
    kind = "noise shift" if profile is SHIFT else "calibration of propagation"
    with pytest.raises(ValueError, match=f"^'{profile.name}' is a {kind}, but a schedule is needed here. Choose a"):
        apply_profile(profile, model)


def test_where_no_schedule_is_needed_each_kind_names_those_that_are():
    refuse_unfit(SHIFT, SD3, "Try another.", ("noise_shift",))
    refuse_unfit(REUSE, SD15, "Try another.", PROPAGATION)
    with pytest.raises(ValueError, match=r"but a calibration of propagation is needed here\. Try another\."):
        refuse_unfit(FITTED, SD15, "Try another.", PROPAGATION)


@pytest.mark.parametrize(
    ("profile", "model", "words"),
    [
        (FITTED, SD3, r"'mine' is for models with Stable Diffusion's noise.*\(SD3\)"),
        (FLOW, SD15, r"'mine' is for flow models.*\(SD15\)"),
        (FITTED, replace(SD15, families=("SDXL",)), "another architecture: SD15, but this MODEL is SDXL"),
        (replace(FITTED, sigmas=(700.0, 1.0, 0.0)), SD15, "starts at sigma 700.*up to 14.61"),
    ],
)
def test_a_profile_for_another_model_is_refused_with_both_names(profile, model, words):
    with pytest.raises(ValueError, match=words):
        apply_profile(profile, model)


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({}, replace(SD15, config_hash="cccc"), "another network configuration"),
        (
            {"weights_hash": "1"},
            replace(SD15, weights_hash="2"),
            "fitted on other weights of the same architecture",
        ),
        (
            {"patches": "none"},
            replace(SD15, patches="some"),
            "fitted without LoRAs, but this MODEL has some",
        ),
        (
            {"patches": "some"},
            replace(SD15, patches="none"),
            "fitted with LoRAs or other weight patches, but this MODEL has none",
        ),
        (
            {"patches": "some"},
            replace(SD15, patches="more"),
            "LoRAs or other weight patches, but this MODEL has others",
        ),
        ({}, replace(SD15, sigma_max=4518.0), "starts at sigma 14.61, below this model's 4518"),
        ({"alignments": ()}, replace(SD15, prediction="v"), "made for eps prediction, but this MODEL has v"),
        ({}, SD15, "Fitted for euler at cfg 7"),
    ],
)
def test_what_makes_the_gain_uncertain_is_said(changes, model, words):
    assert words in said(apply_profile(replace(FITTED, **changes), model))


def test_the_weights_are_compared_where_both_are_known():
    for made, found in (("", "2"), ("1", ""), ("1", "1")):
        applied = apply_profile(replace(FITTED, weights_hash=made), replace(SD15, weights_hash=found))
        assert "other weights" not in said(applied) and "LoRA" not in said(applied)
    other = apply_profile(replace(FITTED, weights_hash="1"), replace(SD15, weights_hash="2", config_hash="cccc"))
    assert "another network configuration" in said(other) and "other weights" not in said(other)


def test_a_step_count_far_from_the_fitted_one_is_said():
    assert "was fitted for 4 steps, but the run has 8" in said(apply_profile(FITTED, SD15, 8))
    assert "was fitted for" not in said(apply_profile(FITTED, SD15, 5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"mode": "karras"}, "no denoise mode 'karras'"), ({"policy": "x"}, "no resolution policy 'x'")],
)
def test_an_unknown_choice_is_answered_with_the_list(changes, words):
    with pytest.raises(ValueError, match=words):
        apply_profile(FITTED, SD15, **changes)


def test_a_shift_other_than_the_fits_is_noted_and_moves_no_level():
    fitted = FLOW.with_facts(shift=3.0)
    for shift, noted in ((3.0, False), (None, False), (5.0, True)):
        applied = apply_profile(fitted, replace(SD3, shift=shift))
        assert ("fitted beside a shift of 3, but this MODEL has 5" in said(applied)) == noted
        assert torch.equal(applied.sigmas, apply_profile(FLOW, SD3).sigmas)


def test_a_fit_for_noise_of_one_scale_is_told_where_the_model_has_another():
    loud = replace(SD3, noise_scale=8.0)
    made = fitted(loud, "schedule", "8 steps", "tuner", (1024, 1024), {}, sigmas=(1.0, 0.5, 0.0))
    assert made.provenance["noise_scale"] == 8 and not misfits(made, loud)
    (misfit,) = misfits(made, SD3)
    assert str(misfit) == "'SD3 8 steps' was fitted on noise of scale 8, but this MODEL has 1." and not misfit.fatal
    (misfit,) = misfits(fitted(SD3, "schedule", "8 steps", "tuner", (1024, 1024), {}, sigmas=(1.0, 0.5, 0.0)), loud)
    assert "fitted on noise of scale 1, but this MODEL has 8" in str(misfit)


def test_kl_optimal_levels_know_the_scale_of_the_noise_and_where_no_signal_is_left():
    loud, said = schedule("KL-optimal", replace(SD3, noise_scale=8.0), 8)
    assert torch.equal(loud, kl_optimal(8, 1.0, NoiseSpace("flow"), 1 / 8).float())
    assert said == "KL-optimal from sigma 1, noise of scale 8"
    _, said = schedule("KL-optimal", SD3, 8)
    assert said == "KL-optimal from sigma 1"
    zero, said = schedule("KL-optimal", ModelIdentity(("CogVideoX_T2V",), "ve", 0.03, 4519.0, "v"), 8)
    assert said == "KL-optimal from sigma 4519, where no signal is left"
    top, _ = schedule("KL-optimal", ModelIdentity(("X",), "ve", 0.03, 1e9, "v"), 8)
    torch.testing.assert_close(zero[1:], top[1:], rtol=2e-3, atol=0)  # the first step ends where it would from any such
