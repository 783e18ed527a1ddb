"""Attention by sigma in the host: where the other function is asked, what stays exact, and what the fit proves."""

from __future__ import annotations

import contextlib

import pytest
import torch

from graphs import STEPS

NAME = "attune_test_every_second_key"
CALLS: list[int] = []


def every_second_key(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
    """Half of the keys: coarse, and right where neighbours are alike."""
    from comfy.ldm.modules.attention import attention_basic

    CALLS.append(1)
    thin = (slice(None), slice(None), slice(None, None, 2)) if skip_reshape else (slice(None), slice(None, None, 2))
    kwargs.pop("_inside_attn_wrapper", None)
    kwargs.pop("transformer_options", None)
    return attention_basic(q, k[thin], v[thin], heads, skip_reshape=skip_reshape, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def registered(host):
    """A function as a pack would register it; gone afterwards."""
    from comfy.ldm.modules import attention

    attention.register_attention_function(NAME, every_second_key)
    yield
    del attention.REGISTERED_ATTENTION_FUNCTIONS[NAME]


def fast(kit, **choice):
    return kit.host.call("AttuneAttentionBySigma", **({"model": kit.model, "kernel": NAME} | choice))[0]


@contextlib.contextmanager
def counted():
    CALLS.clear()
    yield CALLS


def sigmas_of(kit) -> list[float]:
    (sigmas,) = kit.host.call("BasicScheduler", model=kit.model, scheduler="normal", steps=STEPS, denoise=1.0)
    return sigmas.tolist()


def test_stock_is_the_model_itself_and_no_level_between_is_the_stock_run(kit):
    assert fast(kit, kernel="stock") is kit.model
    with counted() as calls:
        out = kit.ksampler(fast(kit, highest_sigma=1e-6, lowest_sigma=0.0))
    assert not calls and torch.equal(out, kit.ksampler(kit.model))


def test_all_levels_are_the_run_whose_model_has_that_attention_throughout(unet):
    model = unet.model.clone()
    override = lambda _, *args, **kwargs: every_second_key(*args, **kwargs)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    everywhere = unet.ksampler(model)
    with counted() as calls:
        assert torch.equal(unet.ksampler(fast(unet, highest_sigma=1000.0, lowest_sigma=0.0)), everywhere)
    whole, levels = len(calls), sigmas_of(unet)
    with counted() as calls:
        part = unet.ksampler(fast(unet, highest_sigma=levels[2], lowest_sigma=levels[4]))
    assert len(calls) * STEPS == whole * 3
    assert not torch.equal(part, everywhere) and not torch.equal(part, unet.ksampler(unet.model))


def test_a_node_that_chooses_attention_already_keeps_it(unet, caplog):
    model = unet.model.clone()
    override = lambda function, *args, **kwargs: function(*args, **kwargs)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    with counted() as calls:
        out = unet.ksampler(fast(unet, model=model, highest_sigma=1000.0, lowest_sigma=0.0))
    assert not calls and torch.equal(out, unet.ksampler(unet.model)) and "stands aside" in caplog.text


def test_the_fit_finds_levels_that_keep_what_was_wanted(unet):
    from pack.kernels.fitted_sampler import fidelity

    given = {"positive": unet.positive, "negative": unet.negative, "latent_image": unet.empty()}
    run = {"steps": STEPS, "cfg": 3.0, "seed": 3}
    exact, coarse = unet.ksampler(unet.model), unet.ksampler(fast(unet, highest_sigma=1000.0, lowest_sigma=0.0))
    wanted = fidelity(coarse, exact) + 3
    profile, plot, report = unet.host.call(
        "AttuneFitAttention", model=unet.model, kernel=NAME, wanted=wanted, **given, **run
    )
    assert plot.shape[-1] == 3 and f"steps tolerate '{NAME}'" in report and "Saved as" in report
    model, *_ = unet.host.call("AttuneApplyProfile", model=unet.model, profile=profile)
    by_profile = unet.ksampler(model)
    assert fidelity(by_profile, exact) >= wanted and not torch.equal(by_profile, exact)
    levels = unet.host.module("nodes._host.attention").levels_of_profile(profile)
    assert f"highest_sigma {levels.highest:.4g}, lowest_sigma {levels.lowest:.4g}." in report
    assert 0 < levels.lowest <= levels.highest < sigmas_of(unet)[0]


@pytest.mark.nightly
def test_with_more_prompts_each_counts_and_others_are_to_keep_it(unet):
    given = {"positive": unet.positive, "negative": unet.negative, "latent_image": unet.empty()}
    run = {"kernel": NAME, "steps": STEPS, "cfg": 3.0, "seed": 3, "wanted": 25.0}
    more = {"positive_2": unet.encode("a cat"), "positive_3": unet.encode("a red car on a blue background")}
    profile, _, report = unet.host.call("AttuneFitAttention", model=unet.model, **given, **run, **more)
    alone = unet.host.call("AttuneFitAttention", model=unet.model, **given, **run)
    assert "Judged by 3 prompts, nine in ten others should keep this." in report and profile.metrics["prompts"] == 3
    assert "Other prompts may keep 10 dB less" in alone[2] and alone[0].metrics["prompts"] == 1
    assert profile.metrics["psnr"] >= 25 and profile.metrics["fast_steps"] <= alone[0].metrics["fast_steps"]


@pytest.mark.nightly
def test_nothing_that_is_good_enough_is_told(unet):
    given = {"positive": unet.positive, "negative": unet.negative, "latent_image": unet.empty(), "steps": STEPS}
    report = unet.host.call("AttuneFitAttention", model=unet.model, kernel=NAME, wanted=120.0, cfg=3.0, **given)[2]
    assert report.startswith(f"Not one of {STEPS} steps tolerates '{NAME}' at 120 dB")


def test_what_cannot_be_is_told(unet):
    with pytest.raises(ValueError, match=r"This ComfyUI has no attention 'sageish'. Choose one of: .*pytorch"):
        fast(unet, kernel="sageish")
    with pytest.raises(ValueError, match=r"no level lies between them. Exchange them"):
        fast(unet, highest_sigma=0.1, lowest_sigma=0.2)
