"""Propagation on a small network of each kind that the host knows: it works, or says why not."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from nightly import daily
from tiny_networks import TINY, conditioning, network_class, tiny_network

STEPS = 20
KEYS = 12  # every second step and the last four
REFUSED = {"Stable_Cascade_C", "Stable_Cascade_B"}  # neither a UNet with skips nor a row of blocks of one kind
DAILY = ("SD15", "Flux", "CosmosT2IPredict2", "HiDream", "Hunyuan3Dv2_1", "Stable_Cascade_C")  # one of each way


@dataclass
class Kind:
    """How propagation stands in for a network's blocks, and those that the steps in between pass over."""

    way: str
    blocks: int
    reused: list


@pytest.fixture(scope="module")
def propagate(host):
    def apply(model, **changed):
        inputs = {
            "mode": "uniform", "interval": 2, "speed": 1.5, "reuse": "automatic", "forecast": True, "keep_last": 4,
            "start_percent": 0.0, "end_percent": 1.0, "prior_noise": 0.0, "cache_dtype": "as computed",
            "cache_device": "as computed", "memory_limit": 0, "parallel": "auto", **changed,
        }  # fmt: skip
        return host.call("AttunePropagation", model=model, **inputs)[0]

    return apply


@pytest.fixture(scope="module")
def draw(host):
    def run(family, model):
        (out,) = host.call(
            "KSampler", model=model, seed=0, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=conditioning(family, 1), negative=conditioning(family, 2),
            latent_image={"samples": torch.zeros(TINY[family].latent)},
        )  # fmt: skip
        return out["samples"]

    return run


def psnr(a, b):
    return float(-10 * ((a - b).square().mean() / b.abs().max() ** 2).log10())


def kind_of(model) -> Kind:
    from pack.nodes._host.propagation.transformer import SEATED, blocks_of
    from pack.nodes._host.propagation.unet import blocks_a_side, unet_of

    unet = unet_of(model)
    if unet is not None:
        return Kind("UNet features", blocks_a_side(unet), [unet.middle_block])
    blocks = blocks_of(model.model.diffusion_model)
    if len(blocks) < 2:
        return Kind("not", len(blocks), [])
    return Kind("block's forward" if (SEATED, 0) in blocks else "host's patch", len(blocks), [*blocks.values()][1:])


class Calls:
    """Counts the calls of the layers inside blocks: those of a block itself go on where a `forward` stands in."""

    def __init__(self, blocks: list):
        self.n = 0
        layers = [layer for block in blocks for layer in block.modules() if not [*layer.children()]]
        self.hooks = [layer.register_forward_hook(self._count) for layer in layers]

    def _count(self, *_):
        self.n += 1

    def taken(self) -> int:
        taken, self.n = self.n, 0
        return taken

    def close(self):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("family", daily(TINY, *DAILY))
def test_steps_run_in_part_or_a_sentence_says_why_not(family, propagate, draw, caplog):
    model = tiny_network(family)
    keys, kind = list(model.model.state_dict()), kind_of(model)
    stock = draw(family, model)
    assert torch.isfinite(stock).all() and stock.std() > 0
    if family in REFUSED:
        with pytest.raises(ValueError, match=rf"this MODEL is a {type(model.model.diffusion_model).__name__}: connect"):
            propagate(model)
        return
    calls = Calls(kind.reused)
    assert torch.equal(draw(family, propagate(model, interval=1)), stock)
    whole = calls.taken() / STEPS
    with caplog.at_level("INFO"):
        ours = propagate(model)
        during = []
        model.model.diffusion_model.register_forward_pre_hook(lambda *_: during.append(list(model.model.state_dict())))
        picture = draw(family, ours)
    assert all(one == keys for one in during) and during and list(model.model.state_dict()) == keys
    said = re.search(r"ran whole (\d+) times \((\d+) of them .*in part (\d+) times, and (\d+) ", caplog.text)
    assert [*map(int, said.groups())] == [
        KEYS,
        0,
        STEPS - KEYS,
        0,
    ] and f"{KEYS} of {STEPS} steps are key" in caplog.text
    assert whole > 0 and calls.taken() == KEYS * whole
    calls.close()
    assert torch.isfinite(picture).all() and not torch.equal(picture, stock) and psnr(picture, stock) >= 20
    assert torch.equal(draw(family, model), stock)


def test_each_network_of_the_host_is_in_the_table(host):
    """By class; a newer host may know others, which the page of this one does not list."""
    import comfy.supported_models

    asked = {network_class(family) for family in TINY}
    others = [kind.__name__ for kind in comfy.supported_models.models if hasattr(comfy.supported_models, kind.__name__)]
    assert not [family for family in others if network_class(family) not in asked]
