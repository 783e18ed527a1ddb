"""Pictures that inpainting models edit badly."""

from __future__ import annotations

import logging

import numpy as np
import torch
from PIL import Image

from ..kernels.protect import Protection
from ._host.api import advanced, io, say_on_node, schema
from ._host.live import ProgressBar
from ._host.protect import check_inpainting, cropped, fitted_masks, memory_needed, protected
from ._plan.protect import masks_for, memory_said, protection_report

LOG = logging.getLogger(__name__)
WHO = "Attune Protect Image"
_SHOWN_EVERY = 10  # iterations


class AttuneProtectImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneProtectImage", WHO, "attune/editing",
            "Changes a picture a little, so that inpainting models edit it badly (DiffusionGuard).",
            search_aliases=["DiffusionGuard", "PhotoGuard", "immunize", "anti deepfake", "adversarial", "Glaze"],
            is_experimental=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("image", tooltip="The picture to protect, or several."),
                io.Mask.Input(
                    "mask",
                    tooltip="White where others may paint anew, such as all but a face. With as many masks as "
                    "pictures, each picture has its own; otherwise every picture is protected against all "
                    "masks.",
                ),
                io.Model.Input("model", tooltip="An inpainting model of the SD class (9 input channels)."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Conditioning.Input(
                    "conditioning", tooltip="An empty prompt, as published, or a prompt that you expect."
                ),
                io.Int.Input(
                    "budget", default=16, min=0, max=128,
                    tooltip="The largest change, as published: 16 are 16/255 of a picture in -1..1, which is 8 of a "
                    "channel's 255 grey levels. 0 leaves the picture as it is.",
                ),
                io.Int.Input(
                    "steps", default=200, min=1, max=100000,
                    tooltip="How many iterations; each calls the VAE and the network forwards and backwards. The "
                    "authors take 800.",
                ),
                io.Int.Input(
                    "mask_reach", default=16, min=0, max=256,
                    tooltip="By how many pixels the contours of the masks may move either way, so that the "
                    "picture is protected against other masks, too. 0: the given masks alone.",
                ),
                *advanced(
                    io.Float.Input(
                        "step_size", default=1.0, min=0.01, max=128.0, step=0.1,
                        tooltip="How much one iteration changes, in the unit of 'budget'. The authors take 1.",
                    ),
                    io.Int.Input(
                        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                        tooltip="The seed of the noises and of the masks' contours.",
                    ),
                    io.Boolean.Input(
                        "gradient_checkpointing", default=True,
                        tooltip="Computes results again on the way back instead of keeping them. That takes less "
                        "memory and half as much time again.",
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The protected picture: save it without loss, as PNG."),
                io.String.Output(display_name="report", tooltip="Says how much was changed, and what that did."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image, mask, model, vae, conditioning, budget=16, steps=200, mask_reach=16, step_size=1.0, seed=0,
        gradient_checkpointing=True,
    ) -> io.NodeOutput:  # fmt: skip
        check_inpainting(model, vae)
        height, width = image.shape[1:3]
        rows, columns = cropped(height, width)
        masks = fitted_masks(mask, height, width)
        if not budget:
            return io.NodeOutput(image, "Budget 0: the picture is as it was.")
        work = [
            (one.movedim(-1, 1)[:, :3, rows, columns], its[:, rows, columns])
            for one, its in zip(image.split(1), masks_for(len(image), masks), strict=True)
        ]
        settings = Protection(budget / 2 / 255, step_size / 2 / 255, steps, mask_reach)
        memory = memory_said(*memory_needed(model, vae, *work[0][0].shape[2:]))
        LOG.info("%s: %s.", WHO, memory)
        say_on_node(cls, f"Takes {memory}.")
        bar = ProgressBar(len(work) * steps)

        def told(i: int, step: int, now: torch.Tensor) -> None:
            bar.update(i * steps + step, None if step % _SHOWN_EVERY else _preview(now))

        found = protected(model, vae, conditioning, work, settings, seed, gradient_checkpointing, told)
        out = image.clone()
        for one, (changed, *_) in zip(out, found, strict=True):
            one[rows, columns, :3] = changed[0].movedim(0, -1)
        report = protection_report([one for one, _ in work], found, memory)
        LOG.info("%s: %s", WHO, report.replace("\n", " "))
        say_on_node(cls, report)
        return io.NodeOutput(out, report)


def _preview(picture: torch.Tensor) -> Image.Image:
    pixels = (picture[0].detach().movedim(0, -1) * 255).round().clamp(0, 255)
    return Image.fromarray(pixels.cpu().numpy().astype(np.uint8))


NODES = [AttuneProtectImage]
