"""Masks for Differential Diffusion that say how much noise each region of a picture needs."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..kernels.noise_mask import time_share
from ._host.api import advanced, io, schema
from ._host.clock import noise_space
from ._plan.noise_mask import EDGES, SOURCES, WARPED, strengths

LOG = logging.getLogger(__name__)


def shares_of_run(model: Any, sigmas: Tensor, strength: Tensor) -> Tensor:
    """The host's mask values [b h w]: the timestep's share between the run's first level and its last.

    The host lowers its threshold from 1 at the first level to 0 at the least; what is below the mask's value joins.
    """
    if len(sigmas) < 2 or float(sigmas[0]) <= 0:
        raise ValueError("Attune Noise Mask: 'sigmas' has no step; raise its 'denoise' above 0.")
    sampling = model.get_model_object("model_sampling")
    least = max(float(sampling.sigma_min), float(sigmas[-1]))
    return time_share(strength, float(sigmas[0]), least, noise_space(sampling), sampling.timestep)


class AttuneNoiseMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneNoiseMask", "Attune Noise Mask", "attune/editing",
            "Makes a mask for Differential Diffusion: more noise where a picture is uncertain, less where it is right.",
            search_aliases=["differential diffusion", "uncertainty", "super-resolution", "UPSR", "WorldWarp"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to sample, before or behind Differential Diffusion."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The sigmas of the sampler. The mask says when a region joins the run, so it depends on "
                    "them.",
                ),
                io.Image.Input("image", tooltip="The picture that goes into VAE Encode: upscaled, restored or warped."),
                io.Combo.Input(
                    "source", options=list(SOURCES), default=EDGES,
                    tooltip="edges: where the picture has edges and texture. two pictures: where 'image' and 'other' "
                    "differ, such as two upscales. warped picture: all noise in 'holes', less elsewhere.",
                ),
                io.Float.Input(
                    "floor", default=0.4, min=0.0, max=1.0, step=0.05,
                    tooltip="The least noise that any region gets, even where the picture is certain. For edges and "
                    "two pictures: a share of the first noise level, 0.4 as published. For a warped picture: a share "
                    "of the run's timesteps, 0.3 to 0.6.",
                ),
                *advanced(
                    io.Int.Input(
                        "feather", default=8, min=0, max=512,
                        tooltip="For a warped picture: over how many pixels around a hole the noise rises to its "
                        "full amount.",
                    )
                ),
                io.Image.Input("other", optional=True, tooltip="For two pictures: the other upscale or restoration."),
                io.Mask.Input("holes", optional=True, tooltip="For a warped picture: white where nothing was seen."),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask", tooltip="For Set Latent Noise Mask, with a MODEL from Differential Diffusion."
                ),
                io.Mask.Output(
                    display_name="strength",
                    tooltip="How much noise each region gets, in the unit of 'floor', to look at.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, sigmas, image, source=EDGES, floor=0.4, feather=8, other=None, holes=None
    ) -> io.NodeOutput:  # fmt: skip
        strength = strengths(source, image, other, holes, floor, feather)
        shares = shares_of_run(model, sigmas, strength)
        mask = strength if source == WARPED else shares
        spread = float(strength.min()), float(strength.max()), float(strength.mean())
        LOG.info("Attune Noise Mask: %s; %.2f to %.2f, on average %.2f of all noise.", source, *spread)
        return io.NodeOutput(mask, strength)


NODES = [AttuneNoiseMask]
