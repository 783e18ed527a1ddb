"""Networks of real size, counted without storage, and one small enough to run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from real_size import FAMILIES, build, feed_forward, forward_flops, gigabytes, parts, shares, side, time_parts

SMALL = {  # the same classes, a tenth of the width
    "SD1.5": replace(
        FAMILIES["SD1.5"], unet_config=FAMILIES["SD1.5"].unet_config | {"model_channels": 32}, pixels=128
    ),
    "SDXL": replace(FAMILIES["SDXL"], unet_config=FAMILIES["SDXL"].unet_config | {"model_channels": 64}, pixels=128),
    "SD3-medium": replace(
        FAMILIES["SD3-medium"],
        unet_config=FAMILIES["SD3-medium"].unet_config
        | {
            "depth": 2,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128},
            },
        },
        pixels=128,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), [("SD1.5", 859.5), ("SDXL", 2567.5), ("SD3-medium", 2028.3)])
def test_the_networks_have_their_published_sizes(host, name, millions):
    assert gigabytes(FAMILIES[name], torch.float32) / 4 * 1000 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_module_with_weights_stands_in_one_part(host, name):
    network = build(name, "meta").model.diffusion_model
    listed = [id(p) for members in parts(network).values() for m in members for p in m.parameters()]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in network.parameters()}
    assert feed_forward(network)


def test_flops_of_sd15_agree_with_an_independent_count(host):
    per_part, kinds = forward_flops("SD1.5")
    total, encoder = FAMILIES["SD1.5"].known
    assert sum(per_part.values()) == sum(kinds.values())
    assert sum(per_part.values()) / 1e9 == pytest.approx(total, rel=2e-3)
    assert side(shares(per_part), "input", "time") == pytest.approx(encoder, abs=0.2)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_small_network_runs_in_the_hosts_sampler_and_its_parts_fill_the_forward(host, name):
    family = SMALL[name]
    model = build(family)
    runs = time_parts(host, model, family, family.pixels, steps=2)
    assert len(runs) == 2
    for run in runs:
        assert all(seconds >= 0 for seconds in run.values())
        assert sum(run.values()) > run["rest"] * 2
    assert not any(m._forward_hooks for m in model.model.diffusion_model.modules())
