"""Noise masks under the host's Differential Diffusion, on the demo flow model."""

from __future__ import annotations

import pytest
import torch

STEPS = 6


@pytest.fixture(scope="module")
def drawn(host, flow_model, demo, encode):
    """A LATENT, MODEL and SIGMAS -> what euler makes of it."""

    def run(latent, model, sigmas):
        return host.call(
            "SamplerCustom", model=model, add_noise=True, noise_seed=3, cfg=2.0, positive=encode("a cat"),
            negative=encode(""), sampler=host.call("KSamplerSelect", sampler_name="euler")[0], sigmas=sigmas,
            latent_image=latent,
        )[0]["samples"]  # fmt: skip

    return run


@pytest.fixture(scope="module")
def flow_model(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]


@pytest.fixture(scope="module")
def sigmas(host, flow_model):
    return host.call("BasicScheduler", model=flow_model, scheduler="simple", steps=STEPS, denoise=0.7)[0]


def picture():
    """A black and a white half."""
    image = torch.zeros(1, 128, 128, 3)
    image[:, :, 64:] = 1
    return image


def masks(host, model, sigmas, **more):
    return host.call("AttuneNoiseMask", model=model, sigmas=sigmas, image=picture(), **more)


def test_all_noise_everywhere_is_the_run_without_a_mask(host, flow_model, sigmas, drawn):
    latent = {"samples": 0.3 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))}
    (model,) = host.call("DifferentialDiffusion", model=flow_model)
    mask, strength = masks(host, model, sigmas, floor=1.0)
    assert torch.equal(mask, torch.ones_like(mask)) and torch.equal(strength, mask)
    (masked,) = host.call("SetLatentNoiseMask", samples=latent, mask=mask)
    torch.testing.assert_close(drawn(masked, model, sigmas), drawn(latent, flow_model, sigmas), rtol=0, atol=1e-5)


def test_holes_are_drawn_anew_and_the_rest_moves_less_the_less_noise_it_gets(host, flow_model, sigmas, drawn):
    latent = {"samples": 0.3 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))}
    (model,) = host.call("DifferentialDiffusion", model=flow_model)
    holes, moved = torch.zeros(1, 128, 128), []
    holes[..., 96:] = 1
    for floor in (0.0, 0.4, 0.7):
        mask, _ = masks(host, model, sigmas, source="warped picture", holes=holes, floor=floor, feather=0)
        (masked,) = host.call("SetLatentNoiseMask", samples=latent, mask=mask)
        change = (drawn(masked, model, sigmas) - latent["samples"]).abs().mean(dim=(0, 1, 2))
        moved.append((float(change[:11].mean()), float(change[13:].mean())))
    outside, inside = zip(*moved, strict=True)
    assert outside[0] < 1e-5 < outside[1] < outside[2] and min(inside) > 0.05


def test_edges_and_two_pictures(host, flow_model, sigmas):
    mask, strength = masks(host, flow_model, sigmas)
    assert float(strength[0, :, 62:66].min()) == 1 and float(strength[0, :, :40].max()) == pytest.approx(0.4)
    assert float(mask[0, 0, 64]) == 1 and 0 < float(mask[0, 0, 0]) < 1
    other = picture()
    other[:, :64] += 0.05
    _, strength = masks(host, flow_model, sigmas, source="two pictures", other=other, floor=0.2)
    assert float(strength[0, 100, 5]) == pytest.approx(0.2) and float(strength[0, 5, 5]) == pytest.approx(0.6)


def test_what_is_missing_is_said(host, flow_model, sigmas):
    for more, text in (
        ({"source": "two pictures"}, "connect the second one"),
        ({"source": "two pictures", "other": torch.zeros(1, 64, 64, 3)}, "scale both to the same size"),
        ({"source": "warped picture"}, "needs 'holes'"),
        ({"source": "clouds"}, "'source' is 'clouds'"),
    ):
        with pytest.raises(ValueError, match=text):
            masks(host, flow_model, sigmas, **more)
    with pytest.raises(ValueError, match="'sigmas' has no step"):
        masks(host, flow_model, sigmas[:0])
