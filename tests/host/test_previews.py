"""Plots on the nodes that fit or apply something: there when the host runs them, not when another node calls them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nightly import daily
from pack.models.one_more_step import colour_map
from pack.nodes._draw.axes import COLOURS


def N(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


LOADER = N("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors")
FLOW = N("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")
LATENT = N("EmptyLatentImage", width=128, height=128, batch_size=2)
APPLY = {
    "steps": 6,
    "denoise": 0.7,
    "denoise_mode": "exact",
    "resolution_policy": "ignore",
    "strength": 1.0,
    "speed": 0.0,
}
PROPAGATE = {
    "mode": "calibrated profile", "interval": 3, "speed": 1.5, "reuse": "top level fresh", "forecast": True, "keep_last": 2,
    "start_percent": 0.0, "end_percent": 1.0, "prior_noise": 0.0, "cache_dtype": "as computed",
    "cache_device": "as computed", "memory_limit": 0, "parallel": "auto",
}  # fmt: skip
GRAPHS = {
    "apply profile": {
        "1": LOADER, "2": N("AttuneLoadProfile", profile_name="Attune demo unet, euler, 8 steps"),
        "7": N("AttuneApplyProfile", model=["1", 0], profile=["2", 0], **APPLY), "8": N("PreviewAny", source=["7", 3]),
    },
    "noise shift": {
        "1": FLOW, "2": N("AttuneLoadProfile", profile_name="Attune demo flow, noise shift"),
        "7": N("AttuneApplyProfile", model=["1", 0], profile=["2", 0], **APPLY), "8": N("PreviewAny", source=["7", 3]),
    },
    "encoder propagation": {
        "1": LOADER, "2": LATENT, "3": N("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "6": N("AttuneFitPropagation", model=["1", 0], positive=["3", 0], negative=["3", 0], latent_image=["2", 0],
               sampler_name="euler", scheduler="simple", steps=8, cfg=1.0, seed=0, reuse="top level fresh", fastest=1.5,
               longest=2),
        "7": N("AttunePropagation", model=["1", 0], profile=["6", 0], **PROPAGATE),
        "8": N("PreviewAny", source=["7", 0]),
    },
    "one more step": {
        "1": LOADER, "2": LATENT, "3": N("AttuneLoadOneMoreStep", oms_name="attune_demo.safetensors",
                                         latent_space="auto", weight_dtype="default", prediction="auto", head_dim=0),
        "4": N("CLIPTextEncode", clip=["1", 1], text="a cat on a blue background"),
        "7": N("AttuneOneMoreStep", model=["1", 0], oms_model=["3", 0], positive=["4", 0], cfg=1.0, strength=1.0,
               solver="ddpm", noise_level="exact", diversity=0.0, share_noise=False, latent=["2", 0]),
        "8": N("VAEDecode", samples=["7", 1], vae=["1", 2]), "9": N("PreviewImage", images=["8", 0]),
    },
}  # fmt: skip


def shown(host, name: str, *nodes: str) -> list[np.ndarray]:
    """The previews on `nodes` of a graph, one after the other."""
    outputs = host.run(GRAPHS[name])
    images = [image for node in nodes for image in outputs[node]["images"]]
    assert {image["type"] for image in images} == {"temp"}
    folder = Path(host.folders) / "temp"
    return [np.asarray(Image.open(folder / image["subfolder"] / image["filename"])) for image in images]


@pytest.mark.parametrize(("name", "curves"), [("apply profile", 2), ("noise shift", 2)])
def test_a_node_that_applies_a_profile_shows_its_curves(host, name, curves):
    (plot,) = shown(host, name, "7")
    for colour in COLOURS[:curves]:
        assert (plot == colour).all(-1).sum() > 200


def test_calibration_and_its_use_show_speed_against_fidelity(host):
    plots = shown(host, "encoder propagation", "6", "7")
    assert [plot.shape for plot in plots] == [(480, 1280, 3), (480, 640, 3)]
    assert all((plot == COLOURS[0]).all(-1).sum() > 50 for plot in plots)


def test_the_predicted_colours_are_shown_as_the_live_preview_would(host):
    *maps, decoded, _ = shown(host, "one more step", "7", "9")
    assert len(maps) == 2 and maps[0].shape == (128, 128, 3)
    red, _, blue = maps[0].reshape(-1, 3).mean(0)
    assert blue > red + 40  # the background that the prompt names
    assert np.abs(maps[0].mean((0, 1)) - decoded.mean((0, 1))).max() < 40


@pytest.fixture
def live(host, demo, encode, monkeypatch):
    """The pictures that the page is sent while a node runs, the host's own of latents left out; and the node's plot."""
    import comfy.utils

    def run(node: str, latent: bool = True, **inputs) -> tuple[list[np.ndarray], list]:
        sent: list[np.ndarray] = []

        def hear(bar, value, total=None, preview=None):
            sent.extend([] if preview is None else [np.asarray(preview[1])])

        monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", hear)
        given = {"positive": encode("a cat on a black background"), "negative": encode("")}
        empty = {"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}} if latent else {}
        all_inputs = {key: value for key, value in {**given, **empty, **inputs}.items() if value is not None}
        return sent, host.call(node, model=demo[0], **all_inputs)

    return run


SHORT = {"seed": 1, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"}
FITS = {  # node, inputs, and the plot among the outputs
    "attention": ("AttuneFitAttention", {**SHORT, "kernel": "split", "wanted": 45.0}, 1),
    "features": ("AttuneFitPropagation", {**SHORT, "reuse": "top level fresh", "fastest": 1.5, "longest": 2}, 1),
    "forecasts": ("AttuneFitPropagation", {**SHORT, "reuse": "nothing asked", "fastest": 1.5}, 1),
}


@pytest.mark.parametrize("kind", daily(FITS, "forecasts"))
def test_a_fit_shows_what_it_found_by_then_and_its_plot_in_the_end(live, kind):
    node, inputs, plot = FITS[kind]
    sent, outputs = live(node, **inputs)
    assert len(sent) >= 2 and not np.array_equal(sent[0], sent[-1])
    assert np.array_equal(sent[-1], (outputs[plot][0].numpy() * 255).round().astype(np.uint8))


def test_a_sampler_that_learns_shows_the_levels_of_the_long_run_and_then_what_it_learned(live, host):
    (sampler,) = host.call("KSamplerSelect", sampler_name="euler")
    (fast,) = host.call("AttuneFastSampler", sampler=sampler, evaluations=4, fidelity=5.0)
    sigmas = torch.cat([torch.linspace(14, 0.1, 9), torch.zeros(1)])
    given = {"add_noise": True, "noise_seed": 1, "cfg": 1.0, "sampler": fast, "sigmas": sigmas}
    for seed in (1, 2):  # of the second run, which is short, nothing is learned
        sent, _ = live("SamplerCustom", **{**given, "noise_seed": seed})
        plots = [picture for picture in sent if picture.shape == (600, 960, 3)]
        drawn = [[bool((plot == colour).all(-1).sum() > 200) for colour in COLOURS[:2]] for plot in plots]
        assert drawn == ([[True, False], [True, True]] if seed == 1 else [])


@pytest.mark.nightly
def test_a_noise_shift_shows_each_level_that_is_done_and_its_plot_in_the_end(live, demo):
    pictures = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    sent, outputs = live(
        "AttuneFitNoiseShift", latent=False, sizes="64x64", native_width=128, native_height=128, vae=demo[2],
        images=pictures,
    )  # fmt: skip
    dots = [(picture == COLOURS[0]).all(-1).sum() for picture in sent[:-1]]
    assert len(dots) >= 5 and dots == sorted(dots) and dots[0] < dots[-1]
    assert np.array_equal(sent[-1], (outputs[1][0].numpy() * 255).round().astype(np.uint8))


@pytest.mark.nightly
def test_drafts_are_shown_as_they_come(live, demo):
    sent, outputs = live("AttuneDraftSeeds", vae=demo[2], drafts=5, speed=1.5, at_once=2, **SHORT)
    *tried, (four, five, decoded) = [*sent[:-3], sent[-3:]]
    assert tried and {picture.shape for picture in tried} == {tried[0].shape}  # the first two, by what is tried on them
    assert tried[0].shape[0] < four.shape[0] and four.shape[1] < five.shape[1]
    assert np.array_equal(decoded, (outputs[2][0].numpy() * 255).round().astype(np.uint8))


@pytest.mark.nightly
def test_training_an_npnet_shows_what_is_golden_in_the_noise_and_then_what_is_learned(live, demo, encode):
    prompts = "\n".join(f"a {word} on a {c} background" for word in ("cat", "star", "apple", "heart", "panda")
                        for c in ("black", "white", "green", "blue"))  # fmt: skip
    sent, _ = live(
        "AttuneTrainNPNet", clip=demo[1], prompts=prompts, name="shown", seeds_per_prompt=2, strong_cfg=4.0, epochs=4,
        size="small", positive=None,
    )  # fmt: skip
    pairs = [picture for picture in sent if picture.shape == (8, 8, 3)]
    learned = [picture for picture in sent if picture.shape == (600, 960, 3)]
    assert len(pairs) >= 2 and len(learned) == 4 and len(pairs) + len(learned) == len(sent)
    dots = [(picture == COLOURS[0]).all(-1).sum() for picture in learned]
    assert dots == sorted(dots) and dots[0] < dots[-1]


def test_a_direct_call_writes_no_preview(host, demo):
    node = host.nodes.NODE_CLASS_MAPPINGS["AttuneApplyProfile"]
    profile, *_ = host.call("AttuneLoadProfile", profile_name="Attune demo unet, euler, 8 steps")
    with torch.inference_mode():
        assert node.execute(demo[0], profile, **APPLY).ui is None


def test_the_colour_map_is_the_linear_map_with_square_pixels():
    x0 = torch.arange(8.0).reshape(1, 2, 2, 2) / 8
    picture = colour_map(x0, [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]], [0.0, -0.25, 9.0])
    assert picture.shape == (1, 16, 16, 3)
    torch.testing.assert_close(picture[0, 0, 15], torch.tensor([(0.125 + 1) / 2, (0.625 - 0.25 + 1) / 2, 1.0]))
