"""Noise shifts on the demo models: fitted through the node, applied through the stock samplers, pass by pass."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from nightly import daily


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")


@pytest.fixture(scope="module")
def prompts(host, encode):
    """One CONDITIONING of eight prompts."""
    texts = [f"a {what} on a {colour} background" for what in ("cat", "pizza", "panda", "rocket")
             for colour in ("black", "white")]  # fmt: skip
    encoded = [encode(text)[0] for text in texts]
    pooled = torch.cat([extra["pooled_output"] for _, extra in encoded])
    return [[torch.cat([context for context, _ in encoded]), {"pooled_output": pooled}]]


def draw(host, model, positive, negative, side=128, batch=1, latent=None, denoise=1.0, sampler="euler"):
    channels = model.model.latent_format.latent_channels
    scheduler = "simple" if channels == 16 else "karras"
    return host.call(
        "KSampler", model=model, seed=3, steps=10, cfg=3.0, sampler_name=sampler, scheduler=scheduler, denoise=denoise,
        positive=positive, negative=negative,
        latent_image=latent or {"samples": torch.zeros(batch, channels, side // 8, side // 8)},
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def clean(host, flow, prompts, encode):
    """Eight latents of 64 px that the flow model drew at that size: to it, its own pictures are the truth."""
    return draw(host, flow[0], prompts, encode(""), side=64, batch=8)


def fit(host, model, positive, **more):
    options = {
        "sizes": "64x64", "native_width": 128, "native_height": 128, "preset": "quick", "seed": 0,
        "save_as": "", "positive": positive,
    } | more  # fmt: skip
    return host.call("AttuneFitNoiseShift", model=model, **options)


@pytest.fixture
def few(host, monkeypatch):
    """A preset of fewer evaluations: five levels, five candidates, one noise for each."""
    presets = host.module("nodes.noise_shift").SHIFT_PRESETS
    monkeypatch.setitem(presets, "quick", type(presets["quick"])(8, 5, 5, 1))


@pytest.fixture(scope="module")
def kit(host):
    """Dataclasses as the host loaded them."""
    import sys

    name = host.nodes.NODE_CLASS_MAPPINGS["AttuneFitNoiseShift"].__module__.removesuffix("nodes.noise_shift")
    return sys.modules[f"{name}models.calibration"], sys.modules[f"{name}nodes._plan.noise_shift"]


@pytest.fixture
def shift(host, flow, kit):
    """A profile of the flow model by hand: 64 px 0.5, 96 px 0.2 log units up."""

    def made(offsets, native=(128, 128), family="SD3"):
        profiles, _ = kit
        at = (0.05, 0.2, 0.5, 0.8, 0.95)
        up = lambda s, d: float(torch.sigmoid(torch.logit(torch.tensor(s)) + d))
        curves = tuple(profiles.CondLevels("", size, at, tuple(up(s, d) for s in at)) for size, d in offsets.items())
        return profiles.Calibration(
            "by hand", "noise shift", "flow", (family,), native, (), "test", kind="noise_shift", prediction="flow",
            alignments=curves,
        )  # fmt: skip

    return made


def heard(model, run):
    """(width of the latent, timestep) of every call of the network."""
    calls = []

    def listen(module, args, kwargs):
        calls.append((args[0].shape[-1], float((args[1] if len(args) > 1 else kwargs["timesteps"])[0])))

    hook = model.model.diffusion_model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        return run(), calls
    finally:
        hook.remove()


@pytest.mark.nightly
def test_a_quick_fit_finds_what_the_model_hears_wrong_and_costs_896_evaluations(host, flow, prompts, clean, shift):
    """A network that hears every level 0.5 log units too high: the fit takes that back, and a shift on the MODEL is not
    in its way."""
    (shifted, *_) = host.call("AttuneApplyProfile", model=flow[0], profile=shift({(64, 64): 0.5}))
    rows = []

    def mishear(module, args):
        rows.append(len(args[0]))
        return args[0], 1000 * torch.sigmoid(torch.logit(args[1] / 1000) + 0.5), *args[2:]

    hook = flow[0].model.diffusion_model.register_forward_pre_hook(mishear)
    profile, plot, report = fit(host, shifted, prompts, latent=clean)
    hook.remove()
    assert sum(rows) == 896 and max(rows) <= 8 and "896 evaluations a size" in report and "kept" in report
    (fitted,) = profile.alignments
    assert fitted.resolution == (64, 64) and profile.metrics["64x64"]["accepted"]
    told = torch.logit(torch.tensor(fitted.sigma_cond)) - torch.logit(torch.tensor(fitted.sigma))
    truth = fit(host, flow[0], prompts, latent=clean)[0].alignments[0]
    own = torch.logit(torch.tensor(truth.sigma_cond)) - torch.logit(torch.tensor(truth.sigma))
    assert (told - own + 0.5).abs()[
        3:-1
    ].max() < 0.15  # below, the loss hardly changes, and to it this model is not right
    assert plot.shape == (1, 600, 960, 3)


def test_every_pass_gets_the_curve_of_the_latent_that_it_samples(host, flow, encode, shift, caplog):
    """A draft of 64 px, then the enlarged latent of 128 px through the same MODEL: told up, then told the truth."""
    positive, negative = encode("a cat on a black background"), encode("")
    model, _, _, report = host.call("AttuneApplyProfile", model=flow[0], profile=shift({(64, 64): 0.5, (96, 96): 0.2}))
    assert "64x64 is calibrated" in report and "96x96 is calibrated" in report

    def two_passes(model):
        small = draw(host, model, positive, negative, side=64)
        (large,) = host.call(
            "LatentUpscale", samples=small, upscale_method="bilinear", width=128, height=128, crop="disabled"
        )
        return draw(host, model, positive, negative, latent=large, denoise=0.5)["samples"]

    with caplog.at_level(logging.INFO):
        _, calls = heard(model, lambda: two_passes(model))
    _, plain = heard(flow[0], lambda: two_passes(flow[0]))
    assert "by hand: 64x64 is calibrated" in caplog.text and "by hand: 128x128 is calibrated, nothing" in caplog.text
    assert [w for w, _ in calls] == [w for w, _ in plain] == [8] * 10 + [16] * 10
    assert calls[10:] == plain[10:] and calls[0] == plain[0]  # the native pass; a flow's 1
    up = torch.logit(torch.tensor([t / 1000 for _, t in calls[2:10]])) - torch.logit(
        torch.tensor([t / 1000 for _, t in plain[2:10]])
    )
    torch.testing.assert_close(up, torch.full((8,), 0.5), rtol=0, atol=0.02)
    third, between = heard(model, lambda: draw(host, model, positive, negative, side=80))
    assert torch.isfinite(third["samples"]).all()
    assert plain[1][1] < between[1][1] < calls[1][1]


@pytest.mark.parametrize(
    "sampler", daily(["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "heun"], "euler", "dpmpp_2m_sde")
)
def test_strength_zero_is_the_model_and_at_the_native_size_the_bits_are_the_same(host, flow, encode, shift, sampler):
    positive, negative = encode("a cat on a black background"), encode("")
    assert host.call("AttuneApplyProfile", model=flow[0], profile=shift({(64, 64): 0.5}), strength=0.0)[0] is flow[0]
    model, *_ = host.call("AttuneApplyProfile", model=flow[0], profile=shift({(64, 64): 0.5}))
    same = [draw(host, m, positive, negative, side=128, sampler=sampler)["samples"] for m in (flow[0], model)]
    assert torch.equal(*same)
    other = [draw(host, m, positive, negative, side=64, sampler=sampler)["samples"] for m in (flow[0], model)]
    assert torch.isfinite(other[1]).all() and (other[0] - other[1]).abs().mean() > 1e-3


def test_shift_nodes_and_aligned_timesteps_compose_in_both_orders(host, flow, encode, shift, kit):
    profiles, _ = kit
    positive, negative = encode("a cat on a black background"), encode("")
    aligned = replace(
        shift({(64, 64): 0.1}), kind="schedule", name="aligned", sigmas=(1.0, 0.8, 0.5, 0.0), solver="euler",
        alignments=(profiles.CondLevels("euler", (64, 64), (0.5, 0.8), (0.45, 0.75)),),
    )  # fmt: skip
    ours = lambda m: host.call("AttuneApplyProfile", model=m, profile=shift({(64, 64): 0.5}))[0]
    align = lambda m: host.call("AttuneApplyProfile", model=m, profile=aligned)[0]
    sd3 = lambda m: host.call("ModelSamplingSD3", model=m, shift=1.5)[0]
    for other in (align, sd3):
        one, two = (
            draw(host, m, positive, negative, side=64)["samples"] for m in (ours(other(flow[0])), other(ours(flow[0])))
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, draw(host, other(flow[0]), positive, negative, side=64)["samples"])


def test_images_are_encoded_at_every_size_and_a_stopped_run_is_continued(host, demo, prompts, few):
    images = torch.rand(8, 72, 80, 3, generator=torch.Generator().manual_seed(0))
    inputs = {"images": images, "vae": demo[2], "sizes": "32x32, 40x32", "save_as": "stopped shift"}
    done, _, _ = fit(host, demo[0], prompts, **inputs | {"sizes": "32x32"})
    calls = []
    hook = demo[0].model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    both, _, report = fit(host, demo[0], prompts, **inputs)
    hook.remove()
    assert {tuple(shape[2:]) for shape in calls} == {(4, 5)} and "1 of 2 sizes were there" in report
    assert both.alignments[0] == done.alignments[0] and [a.resolution for a in both.alignments] == [(32, 32), (40, 32)]
    loaded, *_ = host.call("AttuneLoadProfile", profile_name="stopped shift.json")
    assert loaded == both
    again, _, report = fit(host, demo[0], prompts, **inputs)
    assert again == both and "2 of 2 sizes were there" in report and "\n0 evaluations" in report
    with pytest.raises(ValueError, match="this one with other pictures or settings"):
        fit(host, demo[0], prompts, **inputs | {"seed": 1})
    with pytest.raises(ValueError, match="this one with other pictures or settings"):
        fit(host, demo[0], prompts, **inputs | {"images": images.flip(0)})
    (file,) = host.profiles.iterdir()
    assert file.name == "stopped shift.json"


def test_without_pictures_and_prompts_the_model_draws_its_own(host, demo, few):
    small = {"sizes": "16x16", "native_width": 32, "native_height": 32}
    profile, _, report = fit(host, demo[0], None, vae=demo[2], **small)
    assert "draws its own" in report and "the text is zeroed" in report and "on held-out pictures" in report
    assert profile.resolution == (32, 32) and profile.method == "noise shift"


@pytest.mark.nightly
def test_the_prompt_of_the_workflow_runs(host, few):
    """With the least preset and few steps: the page runs the whole of it in the night."""
    prompt = json.loads((host.root / "tests/prompts/fit_noise_shift.json").read_text("utf-8"))
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    assert sum(bool(output.get("images")) for output in host.run(prompt).values()) >= 2  # the plot, and pictures


def test_interruption_leaves_the_model_as_it_was(host, flow, prompts, clean):
    import comfy.model_management

    calls = []

    def stop(module, args):
        calls.append(1)
        if len(calls) == 30:
            raise comfy.model_management.InterruptProcessingException

    hook = flow[0].model.diffusion_model.register_forward_pre_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fit(host, flow[0], prompts, latent=clean)
    hook.remove()
    assert "process_timestep" not in vars(flow[0].model)


def test_what_cannot_be_calibrated_is_refused_in_a_sentence_before_the_first_call(
    host, flow, demo, prompts, clean, shift
):
    few = {"samples": clean["samples"][:3]}
    images = torch.rand(8, 64, 64, 3)
    never = flow[0].model.diffusion_model.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    for more, words in (
        ({"latent": few}, "'latent' holds 3 pictures, but at least 6"),
        ({"latent": {"samples": torch.zeros(8, 16, 8, 8)}}, "'latent' is empty"),
        ({"latent": clean, "images": images}, "not both"),
        ({"images": images}, "Connect 'vae'"),
        ({"images": images, "vae": flow[2], "sizes": "128x128"}, "'images' are 64x64, smaller than 128x128"),
        ({"images": images, "vae": flow[2], "sizes": ""}, "'sizes' is empty"),
        ({"images": images[:7], "vae": flow[2]}, "8 prompts for 7 pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(host, flow[0], prompts, **more)
    never.remove()
    with pytest.raises(ValueError, match="is for flow models"):
        host.call("AttuneApplyProfile", model=demo[0], profile=shift({(64, 64): 0.5}))
