"""A video with its sound is one LATENT of two tensors: each of our nodes samples it, or says in a sentence why not."""

from __future__ import annotations

import pytest
import torch
from two_streams import BLOCKS, SOUND, VIDEO, nested_latent, prompt, two_stream_model

from graphs import Kit
from methods import METHODS, module

STEPS = 10


@pytest.fixture(scope="module")
def knows(host):
    """A host that knows such latents."""
    pytest.importorskip("comfy.nested_tensor", reason="the host knows no latents of two tensors")


@pytest.fixture(scope="module")
def av(knows):
    return two_stream_model()


@pytest.fixture(scope="module")
def kits(host, knows):
    return {name: Kit(host, name) for name in ("unet", "flow")}


def inputs(model, **changed) -> dict:
    return {
        "model": model, "seed": 3, "steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "positive": prompt(1),
        "negative": prompt(2), "latent_image": nested_latent(), "denoise": 1.0, **changed,
    }  # fmt: skip


def stock(host, model, **changed) -> list[torch.Tensor]:
    return host.call("KSampler", **inputs(model, scheduler="simple", **changed))[0]["samples"].unbind()


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_simulated_model_is_sampled_by_the_stock_nodes(host, av):
    drawn = stock(host, av)
    assert [tuple(one.shape) for one in drawn] == [VIDEO, SOUND] and all(one.isfinite().all() for one in drawn)


# --- what works on it ---


@pytest.mark.parametrize("schedule", ["auto", "KL-optimal"])
def test_the_scheduler_and_the_ksampler_run_it(host, av, schedule, caplog):
    (sigmas,) = host.call(
        "AttuneScheduler", model=av, steps=STEPS, denoise=1.0, schedule=schedule, latent=nested_latent()
    )
    assert len(sigmas) == STEPS + 1
    (ours,) = host.call("AttuneKSampler", **inputs(av, schedule=schedule))
    (solver,) = host.call("KSamplerSelect", sampler_name="euler")
    given = {key: one for key, one in inputs(av).items() if key in ("model", "cfg", "positive", "negative")}
    theirs, _ = host.call(
        "SamplerCustom",
        add_noise=True,
        noise_seed=3,
        sampler=solver,
        sigmas=sigmas,
        latent_image=nested_latent(),
        **given,
    )
    assert same(ours["samples"].unbind(), theirs["samples"].unbind())


def test_the_fast_sampler_makes_the_run_in_full_and_says_why(host, av, caplog):
    (sigmas,) = host.call("BasicScheduler", model=av, scheduler="simple", steps=STEPS, denoise=1.0)
    (solver,) = host.call("KSamplerSelect", sampler_name="euler")
    (fast,) = host.call("AttuneFastSampler", sampler=solver)[:1]
    given = {key: one for key, one in inputs(av).items() if key in ("model", "cfg", "positive", "negative")}
    with caplog.at_level("INFO"):
        drawn, _ = host.call(
            "SamplerCustom", add_noise=True, noise_seed=3, sampler=fast, sigmas=sigmas, latent_image=nested_latent(),
            **given,
        )  # fmt: skip
    assert same(drawn["samples"].unbind(), stock(host, av))
    assert "Only pictures and videos can be learned." in caplog.text


def test_redenoise_begins_such_a_run_elsewhere(host, av, caplog):
    (patched, _) = host.call("AttuneRedenoise", model=av, strong_cfg=3.0)
    with caplog.at_level("INFO"):
        drawn = stock(host, patched)
    assert not same(drawn, stock(host, av)) and all(one.isfinite().all() for one in drawn)
    assert "changed the noise by" in caplog.text


def test_propagation_passes_over_the_blocks_of_both_streams(host, av):
    method = METHODS["block propagation"]
    patched = host.call(method.node, model=av, **method.inputs)[0]
    asked, hooks = [0], []
    for block in av.model.diffusion_model.transformer_blocks:
        hooks.append(block.register_forward_hook(lambda *_: asked.__setitem__(0, asked[0] + 1)))
    try:
        drawn = stock(host, patched)
    finally:
        for hook in hooks:
            hook.remove()
    assert asked[0] < BLOCKS * STEPS and not same(drawn, stock(host, av))
    assert all(one.isfinite().all() for one in drawn)
    assert same(stock(host, host.call(method.node, model=av, **{**method.inputs, **method.off})[0]), stock(host, av))


@pytest.mark.parametrize("reuse", ["first block fresh", "automatic"])
def test_propagation_is_fitted_on_both_streams(host, av, reuse):
    wanted = {key: one for key, one in inputs(av).items() if key != "denoise"}
    profile, *_ = host.call(
        "AttuneFitPropagation",
        **complete(host, "AttuneFitPropagation", {**wanted, "scheduler": "simple", "reuse": reuse}),
    )
    assert profile.key_steps.blocks == (BLOCKS if reuse != "automatic" else 1) and profile.resolution == (1, 1)


def test_auto_runs_on_it(host, av):
    report = host.call(
        "AttuneAuto", model=av, latent=nested_latent(), steps=STEPS, sampler_name="euler", cfg=2.0, denoise=1.0,
        scheduler="simple", schedule="where shown to help", one_more_step="off", noise_shift="off", golden_noise="off",
        speed="off",
    )[2]  # fmt: skip
    assert isinstance(report, str) and report


# --- what refuses it, in a sentence ---


def refusals(host, kit: Kit) -> dict:
    """Node -> its inputs, and part of the sentence that it says of a video with its sound."""
    latent, loaded = nested_latent(), module(kit)
    fit = {"model": kit.model, "positive": kit.positive, "negative": kit.negative, "cfg": 3.0, "seed": 0}
    (euler,) = host.call("KSamplerSelect", sampler_name="euler")
    return {
        "AttuneDraftSeeds": (
            {**fit, "latent_image": latent, "vae": None, "steps": 20},
            "'latent_image' must be a latent of a picture",
        ),
        "AttuneFitSampler": (
            {**fit, "latent": latent, "sampler": euler},
            "'latent' must be a latent of pictures or of one video",
        ),
        "AttuneFitNoiseShift": ({"model": kit.model, "latent": latent}, "video with sound cannot be calibrated"),
        "AttuneOneMoreStep": ({"model": kit.model, **loaded, "latent": latent}, "'latent' must be latents of pictures"),
        "AttuneSignalLeak": ({"model": kit.model, "examples": latent}, "'examples' must be latents of pictures"),
        "AttuneTrainOneMoreStep": (
            {"model": kit.model, "clip": kit.clip, "latents": latent, "name": "x", "captions": "a cat"},
            "'latents' must be latents of pictures",
        ),
        "AttuneTrainNPNet": (
            {"model": kit.model, "clip": kit.clip, "negative": kit.negative, "latent_image": latent, "prompts": "a\nb"},
            "'latent_image' must be a latent of pictures",
        ),
    }


def complete(host, name: str, given: dict) -> dict:
    """With the defaults of all other widgets."""
    asked = host.nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA().inputs
    rest = {one.id: one.default for one in asked if getattr(one, "default", None) is not None and one.id not in given}
    rest |= {
        one.id: one.options[0] for one in asked if one.id not in {**rest, **given} and getattr(one, "options", None)
    }
    return {**rest, **given}


def test_a_node_that_needs_pictures_says_so(host, kits):
    for name, (given, said) in refusals(host, kits["unet"]).items():
        with pytest.raises(ValueError, match=said):
            host.call(name, **complete(host, name, given))


def test_noise_of_a_start_is_not_made_for_a_video(host, av):
    (patched, _) = host.call("AttuneRedenoise", model=av, strong_cfg=3.0)
    (plain,) = host.call("RandomNoise", noise_seed=3)
    (sigmas,) = host.call("BasicScheduler", model=av, scheduler="simple", steps=STEPS, denoise=1.0)
    (noise,) = host.call(
        "AttuneNoise", noise=plain, model=patched, sigmas=sigmas, positive=prompt(1), negative=prompt(2)
    )
    with pytest.raises(ValueError, match="a latent of pictures for Attune Noise, but it holds a video with its sound"):
        noise.generate_noise(nested_latent())


@pytest.mark.parametrize("label", ["one more step", "signal leak", "golden noise"])
def test_what_begins_runs_of_pictures_names_what_came(host, kits, label):
    """On a UNet: its own network would not know such latents, but the sentence comes before it is asked."""
    kit, method = kits["unet"], METHODS[label]
    with pytest.raises(ValueError, match=r"of pictures.* but got a video with its sound"):
        kit.ksampler(method.on(kit)(kit.model), latent_image=nested_latent())
