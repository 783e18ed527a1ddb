"""Forecasts inside the host: what is fitted is what runs, and where a profile does not fit nothing changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from graphs import Kit
from tiny_networks import TINY, conditioning, tiny_network

STEPS = 12


@pytest.fixture(scope="module")
def kit(host) -> Kit:
    return Kit(host, "flow")


def draw(kit, model, **changed):
    given = {"steps": STEPS, "seed": 5, "latent_image": {"samples": torch.zeros(1, kit.channels, 8, 8)}, **changed}
    return kit.ksampler(model, **given)


@pytest.fixture(scope="module")
def fitted(kit, host):
    return host.call(
        "AttuneFitPropagation", model=kit.model, positive=kit.positive, negative=kit.negative, seed=4, steps=STEPS,
        latent_image={"samples": torch.zeros(1, kit.channels, 8, 8)}, cfg=3.0, sampler_name="euler",
        scheduler="normal", reuse="automatic", fastest=2.0, longest=4, positive_2=kit.encode("a cat"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def propagate(host, fitted):
    def apply(model, profile=fitted[0], **changed):
        given = {"mode": "calibrated profile", "interval": 3, "speed": 1.5, "reuse": "automatic", **changed}
        return host.call("AttunePropagation", model=model, profile=profile, **given)[0]

    return apply


def asked_steps(model) -> tuple:
    """A clone, and the sides that each call of the network asks."""
    from comfy.patcher_extension import WrappersMP

    calls: list[list[int]] = []

    def watch(executor, x, t, *args, **kwargs):
        calls.append([*(kwargs.get("transformer_options") or args[3])["cond_or_uncond"]])
        return executor(x, t, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.watch", watch)
    return model, calls


def fidelity(ours, whole):
    from pack.kernels.fitted_sampler import fidelity

    return fidelity(ours.float(), whole.float())


def test_each_setting_asks_what_it_says_and_gives_what_was_measured(kit, host, fitted, propagate):
    profile, _, report = fitted
    points = profile.key_steps.points
    assert profile.kind == "step_forecast" and [p.speed for p in points] == sorted(p.speed for p in points)
    assert points[-1].speed >= 2 and "asks the network on " in report
    two = {"latent_image": {"samples": torch.zeros(2, kit.channels, 8, 8)}}  # what the fit makes of one picture
    both, _ = host.module("nodes._host.session").in_turn(kit.positive, {"positive_2": kit.encode("a cat")}, "this")
    two["positive"] = both
    whole = draw(kit, kit.model, **two)
    parts = draw(kit, kit.model), draw(kit, kit.model, **{**two, "positive": kit.encode("a cat")})[1:]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(whole.split(1), parts, strict=True))
    for point in (points[0], points[-1]):
        model, calls = asked_steps(propagate(kit.model, mode="speed target", speed=point.speed))
        ours = draw(kit, model, **two)
        assert fidelity(ours, whole) == pytest.approx(point.psnr, abs=0.05)
        both, alone = sum(0 in c and 1 in c for c in calls), sum(c == [0] for c in calls)
        assert alone == len(point.one_sided) and both == len(point.keys) - alone == len(calls) - alone
        assert point.speed == pytest.approx(STEPS / (len(point.keys) - alone / 2))


def test_they_are_better_than_as_many_plain_steps_on_other_prompts(kit, fitted, propagate):
    point = fitted[0].key_steps.points[-1]
    other = {"positive": kit.encode("a red apple on a light blue background"), "seed": 11}
    whole = draw(kit, kit.model, **other)
    ours = draw(kit, propagate(kit.model, mode="speed target", speed=point.speed), **other)
    fewer = draw(kit, kit.model, **other, steps=len(point.keys))
    assert fidelity(ours, whole) > fidelity(fewer, whole) + 3


def test_a_wanted_fidelity_is_met_by_the_fastest_setting_that_proved_it_or_by_the_whole_run(
    kit, host, fitted, propagate, caplog
):
    profile, points = fitted[0], fitted[0].key_steps.points
    best = max(points, key=lambda point: point.psnr)
    applied = lambda model, **given: host.call("AttuneApplyProfile", model=model, profile=profile, **given)
    for model in (propagate(kit.model, fidelity=best.psnr), applied(kit.model, fidelity=best.psnr)[0]):
        model, calls = asked_steps(model)
        draw(kit, model)
        assert len(calls) == len(best.keys)
    with caplog.at_level("WARNING"):
        assert propagate(kit.model, fidelity=best.psnr + 0.1) is kit.model
    said = f"kept {best.psnr:.1f} dB at {best.speed:.2f}x, less than the 'fidelity' of"
    model, _, _, report = applied(kit.model, fidelity=100.0)
    assert model is kit.model and said in report and said in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 11}, "fitted to 12 steps of its own schedule, and the run has 11 of another"),
        ({"scheduler": "simple"}, "of its own schedule"),
        ({"sampler": "dpmpp_2m"}, "fitted to euler, and the run has dpmpp_2m"),
        ({"sampler": "heun"}, "fitted to euler, and the run has heun"),
    ],
)
def test_another_run_is_asked_whole_and_it_is_said(kit, propagate, caplog, changed, said):
    stock = draw(kit, kit.model, **changed)
    with caplog.at_level("INFO"):
        assert torch.equal(draw(kit, propagate(kit.model), **changed), stock)
    assert said in caplog.text and "less computing" not in caplog.text and "ran whole" not in caplog.text


@pytest.mark.parametrize(("start", "end"), [(0, 9), (3, 12)])
def test_a_part_of_the_run_is_a_part_of_the_plan(kit, host, fitted, propagate, start, end):
    """What a forecast is made of and this part never asked is asked in its place."""
    point = fitted[0].key_steps.points[-1]
    inside = [key for key in point.keys if start <= key < end]
    model, calls = asked_steps(propagate(kit.model, mode="speed target", speed=point.speed))
    host.call(
        "KSamplerAdvanced", model=model, add_noise="enable", noise_seed=5, steps=STEPS, cfg=3.0, sampler_name="euler",
        scheduler="normal", positive=kit.positive, negative=kit.negative, start_at_step=start, end_at_step=end,
        latent_image=kit.picture(), return_with_leftover_noise="enable",
    )  # fmt: skip
    assert len(inside) <= len(calls) < end - start + (start > 0)


def test_a_poor_forecast_makes_the_next_step_a_whole_one(host, fitted):
    """The run's own key steps tell; the error that the fit expected is made tiny here, and the answers leap."""
    from types import SimpleNamespace

    forecasts = host.module("nodes._host.propagation.forecast")
    fit, point = fitted[0].key_steps, fitted[0].key_steps.points[-1]
    generator = torch.Generator().manual_seed(1)
    answers = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(STEPS)]
    run = forecasts.Forecasts(fit, replace(point, errors=(0.0,) * STEPS), 0, STEPS, ())
    asked: list[int] = []
    for step in range(STEPS):
        ask = lambda step=step: (asked.append(step), answers[step])[1]
        run.answer(ask, answers[step], SimpleNamespace(step=step))
    expected = {key + 1 for key in point.keys[1:] if key + 1 < STEPS and key + 1 not in point.keys}
    assert set(asked) == {*point.keys, *expected} and run.doubted == len(expected) > 0
    assert run.saved == STEPS - len(asked) and run.missing == 0


def in_turn(kit, first, then, at: float):
    span = lambda positive, start, end: kit.host.call(
        "ConditioningSetTimestepRange", conditioning=positive, start=start, end=end
    )[0]
    return kit.host.call(
        "ConditioningCombine", conditioning_1=span(first, 0.0, at), conditioning_2=span(then, at, 1.0)
    )[0]


def test_a_prompt_that_takes_over_is_forecast_from_its_own_answers_alone(kit, propagate, fitted):
    """From those of the prompt before, this run ended at 29 dB."""
    turned = in_turn(kit, kit.positive, kit.encode("a panda on a dark green background"), 0.5)
    model, calls = asked_steps(propagate(kit.model, mode="speed target", speed=2.0))
    ours, whole = draw(kit, model, positive=turned), draw(kit, kit.model, positive=turned)
    assert fidelity(ours, whole) > 40 and len(calls) < STEPS


def test_a_fit_to_prompts_in_turn_forecasts_behind_the_change_from_fewer_answers(kit, host, tmp_path):
    turned = in_turn(kit, kit.positive, kit.encode("a panda on a dark green background"), 0.3)
    profile, *_ = host.call(
        "AttuneFitPropagation", model=kit.model, positive=turned, negative=kit.negative, seed=4, steps=STEPS,
        latent_image={"samples": torch.zeros(1, kit.channels, 8, 8)}, cfg=3.0, sampler_name="euler",
        scheduler="normal", reuse="nothing asked", fastest=1.5, longest=4,
    )  # fmt: skip
    store, point = host.module("models.store"), profile.key_steps.points[-1]
    asked = [sum(key < step for key in point.keys) for step in range(STEPS)]
    assert (2, 3) in [(len(w), min(n, 3)) for w, n in zip(point.weights, asked, strict=True)]  # one answer of three
    assert store.load_profile(store.save_profile(profile, tmp_path)).key_steps == profile.key_steps
    (model,) = host.call(
        "AttunePropagation", model=kit.model, profile=profile, mode="speed target", speed=point.speed, interval=3,
        reuse="automatic",
    )  # fmt: skip
    model, calls = asked_steps(model)
    draw(kit, model, positive=turned)
    assert len(calls) == len(point.keys)


def test_other_guidance_than_the_fits_is_told(kit, host, propagate, caplog):
    """CFGZeroStar scales the answer anew on each step: a fit without it ends 20 dB farther off."""
    draw(kit, propagate(kit.model))
    assert "change guidance" not in caplog.text
    (other,) = host.call("CFGZeroStar", model=kit.model)
    draw(kit, propagate(other))
    assert "change guidance or masks otherwise" in caplog.text
    caplog.clear()
    profile, *_ = host.call(
        "AttuneFitPropagation", model=other, positive=kit.positive, negative=kit.negative, seed=4, steps=STEPS,
        latent_image={"samples": torch.zeros(1, kit.channels, 8, 8)}, cfg=3.0, sampler_name="euler",
        scheduler="normal", reuse="nothing asked", fastest=1.5, longest=4,
    )  # fmt: skip
    draw(kit, propagate(host.call("CFGZeroStar", model=kit.model)[0], profile=profile))
    assert "change guidance" not in caplog.text
    draw(kit, propagate(kit.model, profile=profile))
    assert "change guidance" in caplog.text


def test_without_guidance_nothing_is_one_sided(kit, propagate, fitted):
    model, calls = asked_steps(propagate(kit.model))
    assert draw(kit, model, cfg=1.0).isfinite().all() and all(call == [0] for call in calls)
    assert len(calls) < STEPS


def test_the_profile_survives_its_file_and_serves_other_networks_nodes(kit, host, fitted, propagate, tmp_path):
    load_profile = host.module("models.store").load_profile

    profile = fitted[0]
    saved = load_profile(host.module("models.store").save_profile(profile, tmp_path))
    for one, other in zip(saved.key_steps.points, profile.key_steps.points, strict=True):
        assert vars(one) == vars(other)
    assert saved.key_steps == profile.key_steps and saved.id == profile.id
    applied, _, sigmas, report = host.call("AttuneApplyProfile", model=kit.model, profile=saved)
    assert "calibrated with euler over 12 steps" in report and tuple(sigmas.tolist()) == profile.sigmas
    assert torch.equal(draw(kit, applied), draw(kit, propagate(kit.model)))
    stale = replace(profile, key_steps=replace(profile.key_steps, solver="dpmpp_2m"))
    assert torch.equal(draw(kit, propagate(kit.model, profile=stale)), draw(kit, kit.model))


def test_auto_takes_it_for_the_stock_schedule_alone(kit, host, fitted):
    host.module("nodes._host.folders").keep_fit(fitted[0])
    given = {
        "model": kit.model, "latent": {"samples": torch.zeros(1, kit.channels, 8, 8)}, "steps": STEPS,
        "sampler_name": "euler", "cfg": 3.0, "denoise": 1.0, "one_more_step": "off", "noise_shift": "off",
        "golden_noise": "off", "schedule": "off", "speed": "faithful",
    }  # fmt: skip
    here, there = (host.call("AttuneAuto", **given, scheduler=name)[-1] for name in ("normal", "simple"))
    assert f"propagation: {fitted[0].name}" in here and fitted[0].name not in there


@pytest.mark.parametrize("sampler", ["heun", "euler_cfg_pp"])
def test_a_solver_that_asks_more_than_one_guided_answer_a_step_is_refused(kit, host, sampler):
    given = {
        "model": kit.model, "positive": kit.positive, "negative": kit.negative, "seed": 4, "steps": 8,
        "latent_image": {"samples": torch.zeros(1, kit.channels, 8, 8)}, "cfg": 3.0, "sampler_name": sampler,
        "scheduler": "normal", "fastest": 1.25, "longest": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"'{sampler}' asks the model more than once a step"):
        host.call("AttuneFitPropagation", **given, reuse="nothing asked")


@pytest.mark.parametrize(("below", "searched"), [(0.0, False), (math.inf, True)])
def test_a_slow_setting_is_searched_where_it_is_not_faithful(unet, host, monkeypatch, below, searched):
    fit = host.module("nodes._host.propagation.forecast_fit")
    monkeypatch.setattr(fit, "SEARCHED_BELOW", below)
    tried, climb = [], fit.climb
    monkeypatch.setattr(fit, "climb", lambda *args: tried.append(args[-1]) or climb(*args))
    host.call(
        "AttuneFitPropagation", model=unet.model, positive=unet.positive, negative=unet.negative, seed=4, steps=8, cfg=3.0,
        latent_image={"samples": torch.zeros(1, unet.channels, 8, 8)}, sampler_name="euler", scheduler="normal",
        reuse="nothing asked", fastest=1.5, longest=4, search=2,
    )  # fmt: skip
    assert tried and set(tried) == {2 * searched}


def test_a_latent_out_of_a_batch_is_fitted_and_one_of_no_numbers_is_told(kit, host):
    given = {
        "model": kit.model, "positive": kit.positive, "negative": kit.negative, "seed": 4, "steps": 8, "cfg": 3.0,
        "sampler_name": "euler", "scheduler": "normal", "fastest": 1.25, "longest": 2, "reuse": "automatic",
    }  # fmt: skip
    (taken,) = host.call("LatentFromBatch", samples=kit.empty(4), batch_index=2, length=1)
    found = [host.call("AttuneFitPropagation", **given, latent_image=one)[0] for one in (taken, kit.empty())]
    assert found[0].key_steps == found[1].key_steps
    nothing = {"samples": kit.empty()["samples"] * math.nan}
    part = {"reuse": "top level fresh" if kit.name == "unet" else "first block fresh"}
    run = {key: one for key, one in given.items() if key not in ("fastest", "longest", "reuse")}
    for node, fit in (
        ("AttuneFitPropagation", given),
        ("AttuneFitPropagation", {**given, **part}),
        ("AttuneFitAttention", {**run, "kernel": "split", "wanted": 30.0}),
    ):
        with pytest.raises(ValueError, match="values that are not numbers"):
            host.call(node, **fit, latent_image=nothing)


def test_two_prompts_that_cannot_share_a_batch_are_refused(kit, host):
    given = {
        "model": kit.model, "positive": kit.positive, "negative": kit.negative, "seed": 4, "steps": 8,
        "latent_image": {"samples": torch.zeros(1, kit.channels, 8, 8)}, "cfg": 3.0, "sampler_name": "euler",
        "scheduler": "normal", "fastest": 1.25, "longest": 2, "reuse": "automatic",
    }  # fmt: skip
    for other in ([*kit.positive, *kit.negative], [[kit.positive[0][0][..., :8], kit.positive[0][1]]]):
        with pytest.raises(ValueError, match="one plain prompt each"):
            host.call("AttuneFitPropagation", **given, positive_2=other)


def test_two_experts_of_one_run_have_their_own_forecasts_and_no_state_goes_across(host):
    """Wan 2.2: one network for the noisier half of the levels, another one for the rest, each with its own fit."""
    family, steps = "WAN21_T2V", 18
    fit = host.module("nodes._host.propagation.forecast_fit")
    given = {
        "positive": conditioning(family, 1), "negative": conditioning(family, 2), "steps": steps, "cfg": 3.0,
        "sampler_name": "euler", "scheduler": "simple", "noise_seed": 5,
    }  # fmt: skip

    def half(model, latent, start, end):
        ways = {"add_noise": "disable" if start else "enable", "return_with_leftover_noise": "enable"}
        return host.call(
            "KSamplerAdvanced", model=model, latent_image=latent, start_at_step=start, end_at_step=end, **ways, **given
        )[0]

    empty, experts = {"samples": torch.zeros(TINY[family].latent)}, []
    for spread in (1.0, 0.9):
        model = tiny_network(family)
        for weight in model.model.parameters():
            weight.data.mul_(spread)
        (sigmas,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
        with torch.inference_mode():
            _, faster, kinds = fit.forecasting(model, lambda patched: half(patched, empty, 0, steps)["samples"], "euler", sigmas, 2.0)  # fmt: skip
        experts.append((*asked_steps(faster), kinds))
    (first, first_calls, first_kinds), (second, calls, kinds) = experts
    left = half(first, empty, 0, steps // 2)
    assert len(first_calls) == sum(key < steps // 2 for key in first_kinds.keys) < steps // 2
    ends = [half(second, left, steps // 2, steps)["samples"], half(second, left, steps // 2, steps)["samples"]]
    assert torch.equal(*ends)  # the same behind its own end as behind the other one's
    inside = sum(key >= steps // 2 for key in kinds.keys)
    assert 2 * inside <= len(calls) <= 2 * (steps - steps // 2)  # it asks what its forecasts are made of itself
