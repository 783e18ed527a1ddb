"""Run the host's own sampling nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import nodes as host_nodes
from torch import Tensor

from .solvers import sampler_names


def scheduler_names() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)


def run_stock_node(node_id: str, **inputs) -> tuple:
    """The outputs of a stock node, whether the host defines it in the old or the new node API."""
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    if hasattr(node, "execute"):
        return node.execute(**inputs).result
    return getattr(node(), node.FUNCTION)(**inputs)


def sample(
    model, seed: int, cfg: float, sampler_name: str, sigmas: Tensor, positive, negative, latent: dict,
    through: Callable[[Any], Any] = lambda sampler: sampler,
) -> dict:  # fmt: skip
    """A LATENT out of the stock SamplerCustom, so that noise, masks, previews and batches are the host's business.

    through: SAMPLER -> the one that runs.
    """
    if sampler_name not in sampler_names():
        raise ValueError(
            f"The sampler '{sampler_name}' is not installed in this ComfyUI. Choose another one in 'sampler_name', "
            "or install the pack that brings it."
        )
    # Some samplers (uni_pc) write into the levels they are given.
    output, _ = run_stock_node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=seed, cfg=cfg, positive=positive, negative=negative,
        sampler=through(comfy.samplers.sampler_object(sampler_name)), sigmas=sigmas.clone(), latent_image=latent,
    )  # fmt: skip
    return output
