"""Inversion, replay and morph inside the host, on the demo models: exact where they say so, refused where they must be."""

from __future__ import annotations

import pytest
import torch

from graphs import SIDE, Kit

STEPS = 5
CASES = [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (7.5, 1.0), (7.5, 0.0)]  # cfg 0 is the negative prompt's alone


def levels(kit: Kit, steps: int = STEPS, denoise: float = 1.0):
    return kit.host.call("BasicScheduler", model=kit.model, scheduler="normal", steps=steps, denoise=denoise)[0]


def inverted(kit: Kit, latent: dict | None = None, cfg: float = 3.0, sigmas=None, model=None, **more):
    return kit.host.call(
        "AttuneInvert", model=model or kit.model, positive=kit.positive, negative=kit.negative,
        latent=latent or kit.picture(), sigmas=levels(kit) if sigmas is None else sigmas, cfg=cfg, **more,
    )[0]  # fmt: skip


def replayed(kit: Kit, maps, cfg: float = 3.0, positive=None, model=None, latent=None, sigmas=None, **more):
    """Through the stock SamplerCustom, with noise that must not matter."""
    sampler, own, picture, _ = kit.host.call("AttuneReplay", noise_maps=maps, **more)
    return kit.host.call(
        "SamplerCustom", model=model or kit.model, add_noise=True, noise_seed=5, cfg=cfg,
        positive=positive or kit.positive, negative=kit.negative, sampler=sampler, sigmas=own if sigmas is None else sigmas,
        latent_image=latent or picture,
    )[0]["samples"]  # fmt: skip


def worst(got, want) -> float:
    return float((got - want).abs().max())


@pytest.mark.parametrize(("cfg", "eta"), CASES)
def test_a_replay_is_the_picture_at_every_guidance(kit, cfg, eta):
    picture = kit.picture(2)
    half = inverted(kit, picture, cfg, eta=eta)
    assert worst(replayed(kit, half, cfg, skip=0.0), picture["samples"]) <= 1e-5
    assert worst(replayed(kit, half, cfg, skip=0.4), picture["samples"]) <= 2e-2 * float(picture["samples"].std())
    whole = inverted(kit, picture, cfg, eta=eta, precision="float32")
    assert worst(replayed(kit, whole, cfg, skip=0.4), picture["samples"]) <= 1e-5
    assert half.maps.bytes < 0.6 * whole.maps.bytes
