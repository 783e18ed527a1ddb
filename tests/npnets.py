"""NPNets with seeded weights: the published shape, whose answers are recorded, and a tiny one for the demo model."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pack.models.npnet import NPNet, NPNetConfig

TINY = NPNetConfig(side=16, tokens=16, width=128, swin_width=8, swin_depths=(2,), swin_heads=(2,), hidden=32)


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The recipe of the recorded answers; the same numbers on every machine."""
    return drawn(key, shape).clone()


@lru_cache(maxsize=1000)
def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight, drawn once: the published size's take longer than to ask the network."""
    z = np.random.RandomState(zlib.crc32(f"npnet:{key}".encode())).standard_normal(shape)
    if key in ("alpha", "beta"):
        z = np.full(shape, {"alpha": 0.3, "beta": 0.2}[key])
    elif key == "text_embedding.linear.weight":
        z = 0.5 * z / shape[1] ** 0.5
    elif key.endswith("relative_position_bias_table"):
        z = 0.5 * z
    elif key.endswith(".bias"):
        z = 0.05 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    else:
        z = z / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(np.asarray(z)).to(torch.float32, copy=True)


def seeded(config: NPNetConfig) -> NPNet:
    with torch.device("meta"):
        net = NPNet(config)
    weights = {key: weight(key, tuple(value.shape)) for key, value in net.state_dict().items()}
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)


def inputs(case: str, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise and prompt embeddings of a recorded case."""
    random = np.random.RandomState(zlib.crc32(f"npnet-input:{case}".encode()))
    noise = torch.from_numpy(random.standard_normal((batch, 4, 128, 128))).float()
    return noise, torch.from_numpy(random.standard_normal((batch, 77, width))).float()


def tiny_inputs(batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 16, 16, generator=generator), torch.randn(batch, 16, 128, generator=generator)


def layouts(net: NPNet) -> dict[str, dict]:
    """The weights as the three published layouts hold them, with the parts that inference leaves out."""
    flat = dict(net.state_dict())
    width = flat["unet_embedding.swin.norm.weight"].shape[0]
    flat |= {
        "unet_embedding.swin.head.fc.weight": torch.zeros(1000, width), "unet_embedding.swin.head.fc.bias": torch.ones(1000),
        "unet_svd.bn.weight": torch.ones(4), "unet_svd.bn.num_batches_tracked": torch.tensor(0),
    }  # fmt: skip
    nested: dict = {name: flat[name].clone().requires_grad_() for name in ("alpha", "beta")}
    for part, name in (("unet_embedding", "unet_embedding"), ("unet_svd", "unet_svd"), ("text_embedding", "embeeding")):
        nested[name] = {key.removeprefix(f"{part}."): v for key, v in flat.items() if key.startswith(f"{part}.")}
    misspelt = {key.replace("text_embedding.", "embeeding."): value for key, value in flat.items()}
    return {"official": nested, "asagi4": flat, "LucipherDev": misspelt}
