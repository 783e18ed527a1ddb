"""Makers' schedules on models of the host's own classes: which family gets what, from the LATENT that is sampled."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import comfy_stub
from pack.models.makers import published_for, shipped_makers
from pack.nodes._plan.makers import named_makers

PAGE = Path(__file__).resolve().parents[2] / "docs/makers.md"
SIZES = {  # the host's latent format -> pixels a side of one latent pixel
    "SD15": 8, "SDXL": 8, "SD3": 8, "Flux": 8, "Flux2": 16, "Mochi": 8, "LTXV": 32, "HunyuanVideo": 8, "Wan21": 8,
    "Wan22": 16, "HunyuanImage21": 32, "HunyuanVideo15": 16, "ChromaRadiance": 1, "SC_Prior": 42, "SC_B": 4,
}  # fmt: skip
CHANNELS = {"Flux": (16, 1), "QwenImage": (16, 1), "ZImage": (16, 1), "WAN21_T2V": (16, 1)}


@pytest.fixture(scope="module")
def identity(host):
    from pack.nodes._host import identity

    return identity


class Models(dict):
    """Those that the host has; a test of another is skipped."""

    def __missing__(self, name: str):
        pytest.skip(f"the host has no {name}")


@pytest.fixture(scope="module")
def models(host):
    import comfy.supported_models

    there = [name for name in comfy_stub.NETWORKS if hasattr(comfy.supported_models, name)]
    return Models({name: comfy_stub.family_model(name) for name in there})


def levels(host, model, steps=8, schedule="auto", **more):
    return host.call("AttuneScheduler", model=model, steps=steps, denoise=1.0, schedule=schedule, **more)[0]


def shifted(steps, factor):
    u = torch.linspace(1, 0, steps + 1)
    return factor * u / (1 + (factor - 1) * u)


# --- every family of this host ---


def families(host):
    import comfy.supported_models

    found = {}
    for kind in dict.fromkeys(comfy.supported_models.models):
        try:
            found[kind.__name__] = comfy_stub.family_model(kind.__name__)
        except (KeyError, RuntimeError, AttributeError):  # wants its file's weights for more than the network
            continue
    return found


def check_page(served: list[str], stock: list[str]):
    """The list on the page is of one host; others are looked at, and not written down."""
    from pack.nodes._host import host_version

    text = PAGE.read_text("utf-8")
    assert {*stock} <= {*re.findall(r"\w+", text)}  # what is missing is missing by name, on every host
    marks = r"(<!-- classes of ComfyUI (\S+): .*?-->\n\n).*?(\n\n<!-- end -->)"
    written = re.search(marks, text, flags=re.S)
    if written[2] != host_version():
        return
    said = f"Its maker's: {', '.join(served)}.\n\nThe stock one: {', '.join(stock)}."
    if os.environ.get("ATTUNE_WRITE"):
        text = text[: written.start()] + written[1] + said + written[3] + text[written.end() :]
        PAGE.write_text(text, "utf-8")
    assert said in text


def test_auto_serves_every_family_of_the_host(host, identity, caplog):
    """What its maker publishes, else the schedule of a new stock KSampler, to the bit; the page lists the classes."""
    import comfy.supported_models

    served, stock, found = [], [], families(host)
    for name, model in found.items():
        about = identity.identify(model)
        caplog.clear()
        with caplog.at_level("INFO"):
            sigmas = levels(host, model, 6)
        assert len(sigmas) == 7 and float(sigmas[-1]) == 0
        if published_for(about):
            served.append(name)
            assert f"{published_for(about).name} by {published_for(about).maker}" in caplog.text
        elif "no schedule is published" in caplog.text:
            stock.append(name)
            (theirs,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=6, denoise=1.0)
            assert torch.equal(sigmas, theirs) and f"is published for {name}: the stock 'simple'" in caplog.text
    check_page(sorted(served), sorted(stock))
    known = {"Flux", "Flux2", "QwenImage", "ZImage", "WAN21_T2V", "LTXV", "HunyuanVideo", "Lumina2", "GenmoMochi"}
    known |= {"Chroma", "CosmosT2V", "CosmosT2IPredict2", "ACEStep", "WAN21_Camera", "WAN21_HuMo", "AuraFlow"}
    known = {name for name in known if hasattr(comfy.supported_models, name)}
    assert known <= {*served} and {"ChromaRadiance", "PixArtAlpha"} <= {*stock}


def test_the_table_names_classes_of_the_host(host):
    """Those that it does not know belong to newer ones; a name that none has would be a slip of the pen."""
    import comfy.supported_models

    newer = {"QwenImage21", "LTXAV", "Krea2", "LongCatImage", "Anima", "JoyImage", "Kandinsky5", "Kandinsky5Image"}
    newer |= {"HiDreamO1", "Ideogram4", "WAN21_CausalAR_T2V", "MageFlow", "Lens", "MiniMaxH3", "MiniMaxMusic3", "Boogu"}
    newer |= {"WAN21_SCAIL", "WAN21_SCAIL2", "WAN22_WanDancer", "WAN_Animate2", "ACEStep15", "Trellis2", "TripoSplat"}
    newer |= {"PiD", "SeedVR2", "StableAudio3"}
    newer |= {"Flux2", "HunyuanVideo15", "HunyuanVideo15_SR_Distilled", "ZImage"}  # than 0.3.64
    named = {family for one in shipped_makers().values() for family in one.families}
    assert {one for one in named if not hasattr(comfy.supported_models, one)} <= newer


# --- the size, from the latent ---


@pytest.mark.parametrize(
    ("family", "channels", "side", "pixels_of_it", "factor"),
    [
        ("Flux", 16, 128, (1024, 1024), math.exp(1.15)),
        ("Flux", 16, 64, (512, 512), math.exp(0.5 + 0.65 * 768 / 3840)),
        ("Flux2", 128, 64, (1024, 1024), None),
        ("ZImage", 16, 64, (512, 512), 3.0),
    ],
)
def test_a_latent_tells_the_size(host, models, family, channels, side, pixels_of_it, factor, caplog):
    latent = {"samples": torch.zeros(1, channels, side, side)}
    with caplog.at_level("INFO"):
        sigmas = levels(host, models[family], latent=latent)
    assert f"picture {pixels_of_it[0]}x{pixels_of_it[1]}" in caplog.text
    if factor is not None:
        torch.testing.assert_close(sigmas, shifted(8, factor), rtol=0, atol=1e-6)


def test_the_levels_for_flux_2_are_those_of_its_stock_scheduler_with_the_size_typed(host, models):
    flux2 = models["Flux2"]
    for side in (1024, 2048):
        (theirs,) = host.call("Flux2Scheduler", steps=8, width=side, height=side)
        ours = levels(host, flux2, latent={"samples": torch.zeros(1, 128, side // 16, side // 16)})
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_levels_for_ltx_video_are_those_of_its_stock_scheduler(host):
    model, latent = comfy_stub.family_model("LTXV"), {"samples": torch.zeros(1, 128, 13, 16, 24)}
    (theirs,) = host.call(
        "LTXVScheduler", steps=20, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=latent
    )
    torch.testing.assert_close(levels(host, model, 20, latent=latent), theirs, rtol=0, atol=2e-6)


def test_a_modelsampling_node_is_not_shifted_a_second_time(host, models, caplog):
    latent = {"samples": torch.zeros(1, 16, 128, 128)}
    plain = levels(host, models["Flux"], latent=latent)
    (patched,) = host.call(
        "ModelSamplingFlux", model=models["Flux"], max_shift=2.0, base_shift=1.0, width=1024, height=1024
    )
    with caplog.at_level("INFO"):
        assert torch.equal(levels(host, patched, latent=latent), plain)
    assert "mu 2 -> 1.15 for 1024x1024, 4096 tokens; the ModelSampling node's shift has no part in it" in caplog.text
    (patched,) = host.call("ModelSamplingAuraFlow", model=models["ZImage"], shift=6.0)
    with caplog.at_level("INFO"):
        torch.testing.assert_close(levels(host, patched), shifted(8, 3.0), rtol=0, atol=1e-6)
    assert "shift 6 -> 3" in caplog.text


@pytest.mark.parametrize("family", CHANNELS)
def test_our_ksampler_runs_the_makers_levels_bit_for_bit(host, models, family):
    model = models[family]
    shape = (1, 16, 8, 8) if family in ("Flux", "ZImage") else (1, 16, 1, 8, 8)
    latent = {"samples": torch.zeros(shape)}
    more = {"pooled_output": torch.zeros(1, 16)} if family == "Flux" else {}
    cond = [[torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)), more]]
    common = {"model": model, "cfg": 1.0, "positive": cond, "negative": cond, "latent_image": latent}
    (ours,) = host.call(
        "AttuneKSampler", seed=3, steps=4, sampler_name="euler", schedule="auto", denoise=1.0, **common
    )  # fmt: skip
    (solver,) = host.call("KSamplerSelect", sampler_name="euler")
    sigmas = levels(host, model, 4, latent=latent)
    theirs, _ = host.call("SamplerCustom", add_noise=True, noise_seed=3, sampler=solver, sigmas=sigmas, **common)
    assert torch.equal(ours["samples"], theirs["samples"]) and torch.isfinite(ours["samples"]).all()
    stock = host.call("KSampler", seed=3, steps=4, sampler_name="euler", scheduler="simple", denoise=1.0, **common)[0]
    assert family == "ZImage" or not torch.equal(ours["samples"], stock["samples"])


@pytest.mark.parametrize("name", [one for one in named_makers() if "SDXL" not in one])
def test_a_distilled_list_refuses_sdxl_before_anything_runs(host, name):
    with pytest.raises(ValueError, match=rf"'{name}' is for models of the family .*this MODEL is SDXL\. Choose 'auto'"):
        levels(host, comfy_stub.tiny_model("SDXL"), schedule=name)


def test_the_lists_for_sdxl_are_levels_of_the_model_itself(host):
    model = comfy_stub.tiny_model("SDXL")
    of_model = model.get_model_object("model_sampling").sigmas
    want = torch.cat([of_model[[999, 749, 499, 249]], torch.zeros(1)])
    torch.testing.assert_close(levels(host, model, 4, "DMD2 SDXL"), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(levels(host, model, 4, "SDXL Lightning"), want, rtol=2e-6, atol=0)


# --- sizes of latents, on this host and on newer ones ---


@pytest.mark.parametrize("name", SIZES)
def test_a_latent_pixel_has_as_many_pixels_as_its_format(host, identity, name):
    import comfy.latent_formats

    if not hasattr(comfy.latent_formats, name):
        pytest.skip(f"the host has no latents of {name}")
    latent_format = getattr(comfy.latent_formats, name)()
    assert identity.pixels_a_side(latent_format) == SIZES[name]
    assert identity.pixels_of(latent_format, (1, 4, 10, 20)) == (20 * SIZES[name], 10 * SIZES[name])


def test_a_children_format_has_its_parents_size_and_a_newer_hosts_word_counts_first(host, identity):
    import comfy.latent_formats

    assert identity.pixels_a_side(type("LTXAV", (comfy.latent_formats.LTXV,), {})()) == 32
    assert identity.pixels_a_side(type("New", (comfy.latent_formats.LTXV,), {"spacial_downscale_ratio": 64})()) == 64


@pytest.fixture
def newer_host(host, monkeypatch):
    """Empty latents say at which ratio they were made, and the stock samplers resize them to the model's."""
    import comfy.latent_formats as formats
    import comfy.sample
    import comfy.utils

    if not hasattr(formats, "Flux2"):
        pytest.skip("the host has no Flux2")
    monkeypatch.setattr(formats.LatentFormat, "spacial_downscale_ratio", 8, raising=False)
    monkeypatch.setattr(formats.Flux2, "spacial_downscale_ratio", 16, raising=False)
    own = comfy.sample.fix_empty_latent_channels

    def newer(model, latent, spacial=None, temporal=None):
        samples = own(model, latent)
        if spacial is None or samples.any():
            return samples
        ratio = spacial / model.get_model_object("latent_format").spacial_downscale_ratio
        width, height = (round(side * ratio) for side in (samples.shape[-1], samples.shape[-2]))
        return comfy.utils.common_upscale(samples, width, height, "nearest-exact", "disabled")

    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", newer)


def test_an_empty_latent_of_another_ratio_is_seen_as_the_samplers_take_it(host, identity, models, newer_host, caplog):
    from pack.nodes._host.session import empty_latent

    flux2, latent = models["Flux2"], {"samples": torch.zeros(1, 4, 128, 96), "downscale_ratio_spacial": 8}
    assert identity.pixels(flux2, latent) == (768, 1024) and identity.sampled(flux2, latent).dimensions == 128 * 64 * 48
    assert empty_latent(flux2, latent).shape == identity.as_sampled(flux2, latent).shape == (1, 128, 64, 48)
    with caplog.at_level("INFO"):
        levels(host, flux2, latent=latent)
    assert "for 768x1024, 3072 tokens" in caplog.text


def test_a_latent_with_a_picture_in_it_is_not_resized(host, identity, models, newer_host):
    from pack.nodes._host.session import empty_latent

    latent = {"samples": torch.ones(1, 128, 64, 48), "downscale_ratio_spacial": 8}
    assert identity.pixels(models["Flux2"], latent) == (768, 1024)
    assert empty_latent(models["Flux2"], latent).shape == (1, 128, 64, 48)


def test_the_area_that_auto_sees_is_that_of_the_latent_that_is_sampled(host, models, newer_host):
    from pack.nodes.auto import _facts

    latent = {"samples": torch.zeros(1, 4, 128, 128), "downscale_ratio_spacial": 8}
    facts = _facts(models["Flux2"], latent)
    assert facts.size == (1024, 1024) and facts.area == 64 * 64


# --- a noise shift beside it ---


class Vae16:
    """Averages 16 x 16 pixels into a latent pixel, as wide as Flux.2's."""

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 16).repeat(1, 43, 1, 1)[:, :128]


def test_a_noise_shift_of_half_size_is_not_applied_at_the_native_one(host, models):
    """By the latents of 16 px a side: one of 128 px hears the shift that was fitted there, one of 256 px none."""
    name = host.nodes.NODE_CLASS_MAPPINGS["AttuneScheduler"].__module__.removesuffix("nodes.schedules")
    calibration = sys.modules[f"{name}models.calibration"]
    profile = calibration.Calibration(
        "by hand", "noise shift", "flow", ("Flux2",), (256, 256), (), "test", kind="noise_shift", prediction="flow",
        alignments=(calibration.CondLevels("", (128, 128), (0.2, 0.5, 0.8), (0.3, 0.6, 0.85)),),
    )  # fmt: skip
    for side, said in ((128, "128x128 is calibrated, the network is told 1.42"), (256, "256x256 is calibrated")):
        latent = {"samples": torch.ones(1, 128, side // 16, side // 16)}
        report = host.call("AttuneApplyProfile", model=models["Flux2"], profile=profile, latent=latent)
        (text,) = (one for one in report if isinstance(one, str))
        assert said in text and f"by a shift of {math.sqrt(128 * (side // 16) ** 2 / 4096):.3g} here" in text


def test_sizes_to_fit_are_multiples_of_a_latent_pixel(host, models):
    with pytest.raises(ValueError, match="16"):
        host.call(
            "AttuneFitNoiseShift", model=models["Flux2"], sizes="120x120", native_width=256, native_height=256,
            preset="quick", seed=0, save_as="", positive=[[torch.zeros(1, 5, 16), {}]],
            images=torch.rand(2, 256, 256, 3), vae=Vae16(),
        )  # fmt: skip
