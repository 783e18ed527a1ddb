"""What a fit finds is kept, picked by Attune Auto and sampled with: every kind, as the host runs the graphs of a user.

And what a fit measures is the MODEL without our own nodes on it, whatever stands in front of the fit.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nightly import daily
from pack.kernels.propagation import Reuse
from pack.models.calibration import KeySteps, Point
from pack.models.store import load_profile, save_profile, shipped_profiles
from pack.nodes._plan.auto import ALWAYS, FAITHFUL, OFF, SHOWN

CHECKPOINTS = {"unet": "attune_demo.safetensors", "flow": "attune_demo_flow.safetensors"}
SIDE = 64  # pixels: small, for speed
STEPS = 8
SWITCHES = ("schedule", "one_more_step", "noise_shift", "golden_noise")


def N(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def loaded(kind: str, sampler: str = "euler") -> dict:
    """The model, a prompt from the demo's text encoder, an empty latent and a sampler."""
    return {
        "1": N("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS[kind]),
        "2": N("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS["unet"]),
        "3": N("CLIPTextEncode", clip=["2", 1], text="a cat on a black background"),
        "4": N("CLIPTextEncode", clip=["2", 1], text=""),
        "5": N("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "6": N("KSamplerSelect", sampler_name=sampler),
    }


def of_run(**more) -> dict:
    return {"model": ["1", 0], "positive": ["3", 0], "negative": ["4", 0], "cfg": 3.0, **more}


def kept(host, graph: dict, fit: dict, report: int) -> str:
    """The file that a fit leaves behind, its report read in the graph."""
    outputs = host.run({**graph, "10": fit, "11": N("PreviewAny", source=["10", report])})
    (file,) = host.profiles.glob("*.json")
    assert f"Saved as '{file.name}'" in outputs["11"]["text"][0]
    found = load_profile(file)
    assert len(found.config_hash) == len(found.weights_hash) == 16 and found.patches == "none"
    return file.name


def drawn(host, kind: str, steps: int = STEPS, **switches) -> tuple[str, np.ndarray]:
    """What Attune Auto says, and the picture that its outputs give."""
    asked = {**dict.fromkeys(SWITCHES, OFF), "speed": OFF, **switches}
    auto = N("AttuneAuto", model=["1", 0], latent=["5", 0], steps=steps, sampler_name="euler", cfg=3.0, denoise=1.0,
             scheduler="simple", **asked)  # fmt: skip
    outputs = host.run({
        **loaded(kind), "10": auto, "11": N("PreviewAny", source=["10", 2]),
        "12": N("SamplerCustom", **of_run(model=["10", 0], add_noise=True, noise_seed=3, sampler=["6", 0],
                                          sigmas=["10", 1], latent_image=["5", 0])),
        "13": N("VAEDecode", samples=["12", 0], vae=["1", 2]), "14": N("PreviewImage", images=["13", 0]),
    })  # fmt: skip
    (image,) = outputs["14"]["images"]
    file = Path(host.folders) / "temp" / image["subfolder"] / image["filename"]
    return outputs["11"]["text"][0], np.asarray(Image.open(file)).astype(float)


def changes(host, kind: str, steps: int = STEPS, **switches) -> str:
    """The report of a run whose picture is another one than without the switches."""
    said, picture = drawn(host, kind, steps, **switches)
    _, without = drawn(host, kind, steps)
    assert picture.shape == (SIDE, SIDE, 3) and np.abs(picture - without).mean() > 0.05
    return said


def test_levels_and_timesteps_from_fit_to_picture(host, monkeypatch):
    """The gate keeps every gain here: what it lets pass is for test_gate.py to say."""
    kit = host.module("nodes.fit_sampler")
    tuner = sys.modules[kit.tune.__module__]
    gate = sys.modules[tuner.judge.__module__]
    for name, value in (("FEWEST", 1), ("students_t", lambda *_: 0.0), ("sign_count", lambda *_: 0)):
        monkeypatch.setattr(gate, name, value)
    monkeypatch.setattr(tuner, "judge", lambda before, after, *_, **__: gate.judge(before, after, least=0.0))
    monkeypatch.setitem(kit.TUNER_PRESETS, "mini", type(kit.TUNER_PRESETS["mini"])(1, 1, 16, 1, 2))
    graph = {**loaded("unet"), "9": N("BasicScheduler", model=["1", 0], scheduler="karras", steps=4, denoise=1.0)}
    fit = N("AttuneFitSampler", **of_run(sampler=["6", 0], latent=["5", 0], sigmas=["9", 0], steps=4, preset="mini", levels=True, coefficients=False,
                                         timesteps=True, budget_minutes=0.0, seed=0))  # fmt: skip
    name = kept(host, graph, fit, 3)
    assert f"+ schedule: {name}" in changes(host, "unet", 4, schedule=SHOWN)


def test_a_noise_shift_from_fit_to_picture(host, demo, encode, monkeypatch):
    """Of a network that hears every level 0.5 log units too high, on eight pictures of the right one."""
    import comfy.model_sampling

    flow = host.call("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS["flow"])[0]
    clean = host.call(
        "KSampler", model=flow, seed=3, steps=6, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        positive=encode("a cat on a black background"), negative=encode(""),
        latent_image={"samples": torch.zeros(8, flow.model.latent_format.latent_channels, SIDE // 8, SIDE // 8)},
    )[0]["samples"]  # fmt: skip
    save_file(
        {"latent_tensor": clean.contiguous(), "latent_format_version_0": torch.tensor([])},
        Path(host.folders) / "input" / "clean.latent",
    )
    kind = comfy.model_sampling.ModelSamplingDiscreteFlow
    right = kind.timestep
    monkeypatch.setattr(
        kind, "timestep", lambda self, sigma: right(self, torch.sigmoid(torch.logit(sigma.double()) + 0.5).to(sigma))
    )
    graph = {**loaded("flow"), "9": N("LoadLatent", latent="clean.latent")}
    fit = N("AttuneFitNoiseShift", model=["1", 0], sizes="", native_width=128, native_height=128, preset="quick", seed=0,
            save_as="", cfg=3.0, positive=["3", 0], latent=["9", 0])  # fmt: skip
    name = kept(host, graph, fit, 2)
    assert f"+ noise shift: {name}" in changes(host, "flow", noise_shift=ALWAYS)


@pytest.mark.parametrize("kind", daily(["unet", "flow"], "flow"))
def test_propagation_from_fit_to_picture(host, kind):
    fit = N("AttuneFitPropagation", **of_run(latent_image=["5", 0], seed=1, steps=STEPS, sampler_name="euler",
                                             scheduler="simple", reuse="automatic", fastest=1.5, longest=2))  # fmt: skip
    name = kept(host, loaded(kind), fit, 2)
    said = changes(host, kind, speed="fast")
    assert f"+ propagation: {name}. Calibrated on this network" in said
    assert f"+ propagation: {name}." in drawn(host, kind, speed=FAITHFUL)[0]


# --- a fit measures the MODEL itself ---


def ahead(host, model, what: str):
    """The MODEL behind one of our own nodes that changes what it does."""
    if what == "propagation":
        return host.call("AttunePropagation", model=model, mode="uniform", interval=3, reuse="one block fresh")[0]
    kind = {"timesteps": "schedule", "noise shift": "noise_shift"}[what]
    ours = (one for one in shipped_profiles().values() if one.kind == kind and one.families == ("AttuneDemo",))
    profile = next(one for one in ours if one.alignments)
    return host.call("AttuneApplyProfile", model=model, profile=profile)[0]


@pytest.mark.nightly
@pytest.mark.parametrize("what", daily(["propagation", "timesteps", "noise shift"], "timesteps"))
def test_a_fit_behind_our_own_nodes_finds_what_it_finds_without_them(host, demo, encode, what, monkeypatch):
    kit = host.module("nodes.fit_sampler")
    monkeypatch.setitem(kit.TUNER_PRESETS, "mini", type(kit.TUNER_PRESETS["mini"])(1, 1, 8, 1, 1))
    shifts = host.module("nodes.noise_shift").SHIFT_PRESETS
    monkeypatch.setitem(shifts, "quick", type(shifts["quick"])(6, 5, 5, 1))
    behind = ahead(host, demo[0], what)
    assert behind is not demo[0]
    positive, negative = encode("a cat on a black background"), encode("")
    run = {"positive": positive, "negative": negative, "cfg": 3.0, "seed": 3}
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    (euler,) = host.call("KSamplerSelect", sampler_name="euler")
    tune = {"sampler": euler, "latent": latent, "steps": 3, "preset": "mini", "budget_minutes": 0.0,
            "coefficients": False}  # fmt: skip
    found = [host.call("AttuneFitSampler", model=model, **run, **tune)[0] for model in (demo[0], behind)]
    assert found[0].id == found[1].id and found[0].metrics == found[1].metrics
    reuse = {"latent_image": latent, "steps": 8, "sampler_name": "euler", "scheduler": "simple",
             "reuse": "one block fresh", "fastest": 1.5, "longest": 2}  # fmt: skip
    found = [host.call("AttuneFitPropagation", model=model, **run, **reuse)[0] for model in (demo[0], behind)]
    assert found[0].key_steps == found[1].key_steps
    pictures = {"samples": torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    fit = {"sizes": "", "native_width": 128, "native_height": 128, "preset": "quick", "positive": positive}
    found = [host.call("AttuneFitNoiseShift", model=model, latent=pictures, **fit)[0] for model in (demo[0], behind)]
    assert found[0].alignments == found[1].alignments and found[0].metrics == found[1].metrics


# --- what is found for another model ---


def test_auto_uses_no_calibration_of_other_weights(host):
    """Of the same network: a fine-tune has the host's own family and configuration."""
    schedule = shipped_profiles()["Attune demo unet, euler, 8 steps"]
    levels = schedule.sigmas
    points = (Point(Reuse(1, 5, False), (0, 2, 4), 1.5, 60.0),)
    mine = replace(
        schedule, name="mine", kind="encoder_propagation", alignments=(), key_steps=KeySteps(6, "euler", levels, points)
    )
    save_profile(mine, host.profiles)
    assert "+ propagation: mine.json" in drawn(host, "unet", speed=FAITHFUL)[0]
    (host.profiles / "mine.json").unlink()
    save_profile(replace(mine, weights_hash="0" * 16), host.profiles)
    assert "mine.json" not in drawn(host, "unet", speed=FAITHFUL)[0]
