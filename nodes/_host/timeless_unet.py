"""The host's UNet class without its time path: the network of One More Step."""

from __future__ import annotations

import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from ...models.one_more_step import Architecture


class TimelessUNet(UNetModel):
    """noise [b c h w], text [b tokens width] -> v [b c h w]."""

    def __init__(self, architecture: Architecture, operations=comfy.ops.disable_weight_init, **kwargs):
        super().__init__(**architecture.unet_config(), operations=operations, **kwargs)
        self.time_embed = nn.Identity()
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.skip_t_emb, block.emb_layers, block.exchange_temb_dims = True, None, False

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, timesteps=torch.zeros(len(x), device=x.device), context=context)


def diffusers_names(architecture: Architecture) -> dict[str, str]:
    """Name in a published file -> name in the host's class, for every tensor of a timeless network."""
    with torch.device("meta"):
        own = TimelessUNet(architecture, dtype=torch.float32).state_dict().keys()
    return {theirs: ours for theirs, ours in comfy.utils.unet_to_diffusers(architecture.unet_config()).items()
            if ours in own}  # fmt: skip


def initialise(network: TimelessUNet, generator: torch.Generator) -> None:
    """PyTorch's usual random weights, which the host's layers leave out, and no output at all to begin with."""
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters(recurse=False):
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    for parameter in network.out[2].parameters():
        nn.init.zeros_(parameter)
