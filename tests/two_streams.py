"""A model of a video with its sound, as hosts of 2026 have (LTX-2, MiniMax-H3): latents of two tensors, packed in one.

ComfyUI 0.3.75 carries such latents through its samplers and has no model for them, so this one stands in.
"""

from __future__ import annotations

import torch
from torch import nn

VIDEO, SOUND = (1, 16, 2, 8, 8), (1, 8, 6)
BLOCKS = 10


class Block(nn.Module):
    """One layer for each stream, both told the prompt and the time."""

    def __init__(self, operations, width: int):
        super().__init__()
        self.video, self.sound = (operations.Linear(width, width) for _ in range(2))

    def forward(self, streams, told):
        parts = zip(streams, (self.video, self.sound), strict=True)
        return tuple(x + 0.1 * torch.tanh(layer(x) + told) for x, layer in parts)


class Network(nn.Module):
    """Asks patches as the host's two-stream transformers do: their "img" is the pair of both streams."""

    def __init__(self, dtype=None, device=None, operations=nn, width: int = 16, **_):
        super().__init__()
        self.dtype = dtype
        self.into = nn.ModuleList([operations.Linear(VIDEO[1], width), operations.Linear(SOUND[1], width)])
        self.out = nn.ModuleList([operations.Linear(width, VIDEO[1]), operations.Linear(width, SOUND[1])])
        self.text = operations.Linear(16, width)
        self.transformer_blocks = nn.ModuleList(Block(operations, width) for _ in range(BLOCKS))

    def forward(self, x, timestep, context, transformer_options=None, **_):
        patches = (transformer_options or {}).get("patches_replace", {}).get("dit", {})
        told = self.text(context).mean(1, keepdim=True) + timestep.reshape(-1, 1, 1) / 1000
        tokens = tuple(layer(part.flatten(2).movedim(1, 2)) for layer, part in zip(self.into, x, strict=True))
        for i, block in enumerate(self.transformer_blocks):
            if ("double_block", i) in patches:
                original = lambda args, block=block: {"img": block(args["img"], args["vec"])}
                given = {"img": tokens, "vec": told}
                tokens = patches["double_block", i](given, {"original_block": original})["img"]
            else:
                tokens = block(tokens, told)
        ends = zip(self.out, tokens, x, strict=True)
        return [layer(part).movedim(1, 2).reshape(like.shape) for layer, part, like in ends]


def two_stream_model():
    """A ModelPatcher of it, with random weights."""
    import comfy.conds
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    class TwoStreams(comfy.model_base.BaseModel):
        def extra_conds(self, **kwargs):
            found = {**super().extra_conds(**kwargs), "c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"])}
            shapes = kwargs.get("latent_shapes")
            return found if shapes is None else {**found, "latent_shapes": comfy.conds.CONDConstant(shapes)}

    config = comfy.supported_models.LTXV({"image_model": "two streams"})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    model = TwoStreams(config, comfy.model_base.ModelType.FLOW, device=cpu, unet_model=Network).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def nested_latent(batch: int = 1) -> dict:
    """An empty LATENT of both."""
    import comfy.nested_tensor

    parts = [torch.zeros(batch, *shape[1:]) for shape in (VIDEO, SOUND)]
    return {"samples": comfy.nested_tensor.NestedTensor(parts)}


def prompt(seed: int = 0) -> list:
    return [[torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed)), {}]]
