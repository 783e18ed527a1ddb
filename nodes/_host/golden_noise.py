"""Golden noise where the host makes noise: as a NOISE object, and in front of every sampler of a MODEL.

OUTER_SAMPLE sees the noise before the MODEL is loaded, so that a small network fits even where the MODEL fills the
memory. The host's own patcher class loads and frees it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...models.npnet import prompt_texts
from ...models.npnet_files import NPNetFile, load_npnet
from .._plan.golden_noise import Settings, check_size, golden_noise
from .api import io

LOG = logging.getLogger(__name__)
KEY = "attune.golden_noise"
ALMOST_ALL = 0.98  # of the highest noise level: from here a run starts from noise alone
LIMITED = ("area", "mask", "start_percent")  # what makes a prompt one for a part of the picture or of the run

NPNetType = io.Custom("ATTUNE_NPNET")


@dataclass(frozen=True)
class HostNPNet:
    """A network in the care of the host."""

    file: NPNetFile
    patcher: comfy.model_patcher.ModelPatcher

    @classmethod
    def of(cls, file: NPNetFile) -> HostNPNet:
        management = comfy.model_management
        devices = management.get_torch_device(), management.unet_offload_device()
        return cls(file, comfy.model_patcher.ModelPatcher(file.net, *devices))

    @classmethod
    def load(cls, path: Path) -> HostNPNet:
        return cls.of(load_npnet(path))

    def refine(self, noise: Tensor, conds: list[dict], settings: Settings, who: str) -> Tensor:
        """Golden noise [b c h w] on the CPU for the host's prompts; ValueError in the user's words before any work."""
        _check_plain(noise)
        config = self.file.net.config
        check_size(config, noise.shape, settings.other_sizes)
        texts = _texts(config, conds, settings, who)
        if settings.strength == 0 or not noise.any():
            return noise
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        with torch.no_grad():
            golden = golden_noise(
                self.file.net, noise, texts, settings, comfy.model_management.throw_exception_if_processing_interrupted
            )
        change = float((golden - noise).square().mean().sqrt() / noise.square().mean().sqrt())
        size = tuple(noise.shape[-2:])
        windows = (
            "" if size == (config.side, config.side) else f", in windows of {config.side} x {config.side}, its own size"
        )
        LOG.info(
            "%s: %s changed the noise of %d x %d latents by %.3g of its size at strength %g%s.",
            who, self.file.name, *size, change, settings.strength, windows,
        )  # fmt: skip
        return golden


class GoldenNoise:
    """A NOISE: another NOISE made golden for one prompt."""

    def __init__(self, inner: Any, npnet: HostNPNet, conditioning: list, settings: Settings):
        self.seed = getattr(inner, "seed", 0)
        self._inner, self._npnet, self._settings = inner, npnet, settings
        self._conds = [{**extra, "cross_attn": tokens} for tokens, extra in conditioning]

    def generate_noise(self, input_latent: dict) -> Tensor:
        noise = self._inner.generate_noise(input_latent)
        return self._npnet.refine(noise, self._conds, self._settings, "Attune Golden Noise")


def check_prompt(npnet: HostNPNet, conditioning: list, settings: Settings) -> None:
    """ValueError now, when the node runs, for a prompt that the network cannot read."""
    conds = [{**extra, "cross_attn": tokens} for tokens, extra in conditioning]
    _texts(npnet.file.net.config, conds, settings, "Attune Golden Noise")


def with_golden_noise(model: Any, npnet: HostNPNet, settings: Settings, partial: bool) -> Any:
    """A clone of MODEL whose runs start from golden noise; MODEL itself at strength 0.

    partial: also where a run starts from a picture.
    """
    if settings.strength == 0:
        return model

    def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        why = why_not(guider.model_patcher, noise, latent_image, sigmas, partial)
        if why is None:
            conds = guider.conds.get("positive", [])
            noise = npnet.refine(noise, conds, settings, "Attune Golden Noise Model")
        else:
            LOG.info("Attune Golden Noise Model: stands aside, %s.", why)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    return clone


def why_not(model: Any, noise: Tensor, latent: Tensor, sigmas: Tensor, partial: bool) -> str | None:
    """Why the noise of a run stays as it is, in the user's words; None when it should become golden."""
    if len(sigmas) < 2:
        return "the run has no step"
    if not noise.any():
        return "this run adds no noise"
    top = float(model.get_model_object("model_sampling").sigma_max)
    if partial or not latent.any() or float(sigmas[0]) >= ALMOST_ALL * top:
        return None
    return (
        f"this run starts from a picture at noise level {float(sigmas[0]):.3g} of {top:.3g}; 'partial_denoise' can "
        "change that"
    )


def _texts(config, conds: list[dict], settings: Settings, who: str) -> list[Tensor]:
    if not conds:
        raise ValueError("Golden Noise needs a text conditioning.")
    chosen = next((i for i, cond in enumerate(conds) if not any(cond.get(name) for name in LIMITED)), 0)
    if len(conds) > 1:
        LOG.info("%s: of %d prompts it reads number %d.", who, len(conds), chosen + 1)
    cond = conds[chosen]
    tokens = cond.get("cross_attn")
    if config.text == "flat" and tokens is not None and tokens.ndim == 3 and tokens.shape[1] > config.tokens:
        LOG.info("%s: the prompt has %d tokens; %s of %d.", who, tokens.shape[1], settings.long_prompt, config.tokens)
    return prompt_texts(config, tokens, cond.get("pooled_output"), settings.long_prompt)


def _check_plain(noise: Tensor) -> None:
    if getattr(noise, "is_nested", False):
        raise ValueError("Golden Noise is for image latents only; got a video with its sound.")
