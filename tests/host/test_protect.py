"""Protection through the host: the copies compute what the host computes, and nothing of MODEL or VAE changes."""

from __future__ import annotations

import re

import pytest
import torch

SIDE = 64


@pytest.fixture(scope="module")
def inpaint(host):
    """MODEL, CLIP and VAE."""
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_inpaint.safetensors")


@pytest.fixture(scope="module")
def given(host, inpaint):
    """A picture [1 h w 3] of whole grey levels, its mask, and the rest that the node wants."""
    model, clip, vae = inpaint
    picture = torch.full((1, SIDE, SIDE, 3), 0.4)
    picture[:, 20:44, 20:44, 0] = 0.8
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 16:48, 16:48] = 1
    (empty,) = host.call("CLIPTextEncode", clip=clip, text="")
    picture = (picture * 255).round() / 255
    return {"image": picture, "mask": mask, "model": model, "vae": vae, "conditioning": empty}


def protect(host, given, **more):
    return host.call("AttuneProtectImage", **{**given, "steps": 6, "mask_reach": 0, "step_size": 4.0, **more})


def test_the_copies_say_what_the_hosts_own_sampling_is_told(host, given, inpaint):
    """A run of one step from the same noise ends at the denoised picture, which the prediction gives too."""
    made, model, vae = host.module("nodes._host.protect"), given["model"], given["vae"]
    positive, _, latent = host.call(
        "InpaintModelConditioning", positive=given["conditioning"], negative=given["conditioning"], vae=vae,
        pixels=given["image"], mask=given["mask"], noise_mask=False,
    )  # fmt: skip
    latent = {"samples": torch.zeros_like(latent["samples"])}
    (noise,) = host.call("RandomNoise", noise_seed=5)
    with torch.inference_mode(False):
        editor = made.Editor(model, vae, given["conditioning"], tuple(latent["samples"].shape))
        picture, mask = given["image"].movedim(-1, 1).clone(), given["mask"].clone()
        hidden = host.module("kernels.protect").shown(picture, mask)
        v, sigma = editor.predicted(torch.manual_seed(5), hidden, mask), editor.sigma
    start = model.model.model_sampling.noise_scaling(sigma, noise.generate_noise(latent), latent["samples"], True)
    (guider,) = host.call("BasicGuider", model=model, conditioning=positive)
    end = host.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, latent_image=latent,
        sampler=host.call("KSamplerSelect", sampler_name="euler")[0], sigmas=torch.tensor([float(sigma), 0.0]),
    )[0]["samples"]  # fmt: skip
    denoised = model.model.process_latent_in(end)
    alpha = 1 / (1 + sigma**2).sqrt()
    torch.testing.assert_close(alpha**2 * start - alpha * sigma * v, denoised, rtol=1e-3, atol=2e-3)


@pytest.mark.nightly
def test_the_picture_as_it_is_by_then_is_shown(host, given, monkeypatch):
    import comfy.utils

    sent = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda bar, done, total=None, preview=None: sent.append(preview)
    )
    protect(host, given, steps=20)
    assert len(sent) == 20 and [picture[1].size for picture in sent if picture] == [(SIDE, SIDE)] * 2


def test_the_first_estimate_grows_inside_the_budget_and_outside_of_the_mask(host, given):
    out, report = protect(host, given)
    change = (out - given["image"]).abs() * 255
    kept = given["mask"] < 0.5
    assert float(change.max()) <= 8.001 and float(change[~kept].max()) == 0
    assert float((change[kept] > 3).float().mean()) > 0.5
    first, last = map(float, re.search(r"prediction ([\d.]+) -> ([\d.]+);", report).groups())
    assert last > first * 1.0005, report
    assert "PSNR" in report and "JPEG" in report and "GB" in report
    torch.testing.assert_close((out * 255).round() / 255, out, rtol=0, atol=1e-6)  # a PNG keeps it


def test_the_same_seed_protects_alike_and_nothing_of_the_model_changes(host, given):
    networks = (given["model"].model.diffusion_model, given["vae"].first_stage_model)
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in networks]
    options = {name: len(value) for name, value in vars(given["model"]).items() if hasattr(value, "__len__")}
    once, _ = protect(host, given, steps=2, mask_reach=4)
    again, _ = protect(host, given, steps=2, mask_reach=4)
    other, _ = protect(host, given, steps=2, mask_reach=4, seed=1)
    assert torch.equal(once, again) and not torch.equal(once, other)
    for one, weights in zip(networks, before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
        assert not [name for name, part in one.named_modules() if "forward" in vars(part)]
    assert options == {name: len(value) for name, value in vars(given["model"]).items() if hasattr(value, "__len__")}


def test_a_lora_of_the_model_is_protected_against(host, given):
    name = "diffusion_model.input_blocks.0.0.weight"
    weight = given["model"].model.state_dict()[name]
    clone = given["model"].clone()
    clone.add_patches({name: ("diff", (torch.randn(weight.shape, generator=torch.manual_seed(0)),))})
    plain, _ = protect(host, given, steps=1)
    assert not torch.equal(protect(host, given, steps=1, model=clone)[0], plain)
    assert torch.equal(protect(host, given, steps=1)[0], plain)


def test_budget_0_is_the_picture(host, given):
    assert protect(host, given, budget=0)[0] is given["image"]


def test_pictures_of_a_batch_get_their_own_masks_and_odd_sizes_keep_their_border(host, given):
    image = torch.nn.functional.pad(given["image"].movedim(-1, 1), (3, 2, 1, 4), mode="replicate").movedim(1, -1)
    mask = torch.nn.functional.pad(given["mask"], (3, 2, 1, 4))
    pictures, masks = image.repeat(2, 1, 1, 1), torch.cat([mask, 1 - mask])
    out, report = protect(host, given, image=pictures, mask=masks, steps=1)
    assert out.shape == pictures.shape and report.count("Picture ") == 2
    changed = (out - pictures).abs().amax(-1) > 0
    assert not (changed & (masks > 0.5)).any() and changed[0].any() and changed[1].any()
    rows, columns = host.module("nodes._host.protect").cropped(*image.shape[1:3])
    changed[:, rows, columns] = False
    assert not changed.any()


def test_stopped_it_leaves_nothing(host, given):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        protect(host, given)
    assert not management.processing_interrupted()
    assert not [name for name, part in given["model"].model.named_modules() if "forward" in vars(part)]


def test_what_cannot_be_protected_is_said(host, given, demo):
    for more, text in (
        ({"model": demo[0]}, "needs an inpainting model of the SD class"),
        ({"image": torch.zeros(1, 4, 64, 3)}, "at least 8 x 8 pixels"),
        ({"mask": torch.zeros(1, 64, 64)}, "mask 1 of 1 is empty"),
        ({"mask": torch.ones(2, SIDE, SIDE)}, "mask 1 of 2 covers the whole picture"),
        (
            {"vae": host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[2]},
            "4 latent channels",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            protect(host, given, **more)
