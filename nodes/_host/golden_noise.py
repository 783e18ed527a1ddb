"""Golden noise from an NPNet as the start of a MODEL's runs; the host loads and frees the network."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...models.npnet import prompt_texts
from ...models.npnet_files import NPNetFile, load_npnet
from .._plan.golden_noise import GoldenSettings, check_size, golden_noise
from .api import io
from .start import Start, StartingRun

LOG = logging.getLogger(__name__)
WHO = "Attune Golden Noise"

NPNetType = io.Custom("ATTUNE_NPNET")


@dataclass(frozen=True)
class HostNPNet:
    """A network in the care of the host."""

    file: NPNetFile
    patcher: comfy.model_patcher.ModelPatcher

    @classmethod
    def load(cls, path: Path) -> HostNPNet:
        file, management = load_npnet(path), comfy.model_management
        devices = management.get_torch_device(), management.unet_offload_device()
        return cls(file, comfy.model_patcher.ModelPatcher(file.net, *devices))


@dataclass(frozen=True)
class GoldenNoise(Start):
    """What the network makes of the noise for the run's own prompt. partial: also where it starts from a picture."""

    npnet: HostNPNet
    settings: GoldenSettings
    partial: bool = False
    who = WHO
    place = "golden noise"

    @property
    def strength(self) -> float:
        return self.settings.strength

    def check(self, positive: list | None) -> None:
        self._texts([{**extra, "cross_attn": text} for text, extra in positive or []])

    def begin(self, run: StartingRun) -> tuple[Tensor, str]:
        """Golden noise [b c h w] on the CPU; ValueError before any work."""
        net, noise, settings = self.npnet.file.net, run.noise, self.settings
        check_size(net.config, noise.shape, settings.other_sizes)
        texts = self._texts(run.guider.conds.get("positive", []))
        comfy.model_management.load_models_gpu([self.npnet.patcher], force_full_load=True)
        stop = comfy.model_management.throw_exception_if_processing_interrupted
        with torch.no_grad():
            golden = golden_noise(net, noise, texts, settings, stop)
        change = float((golden - noise).square().mean().sqrt() / noise.square().mean().sqrt())
        (height, width), side = noise.shape[-2:], net.config.side
        windows = "" if (height, width) == (side, side) else f", in windows of {side} x {side}, its own size"
        return golden, (
            f"{self.npnet.file.name} changed the noise of {height} x {width} latents by {change:.3g} of its size at "
            f"strength {settings.strength:g}{windows}"
        )

    def _texts(self, conds: list[dict]) -> list[Tensor]:
        """What the network reads of the host's prompts; ValueError where there is none that it can read."""
        config, long_prompt = self.npnet.file.net.config, self.settings.long_prompt
        if not conds:
            raise ValueError(
                f"{WHO} reads the prompt of the run, but there is none. Connect 'positive' of the sampler, of its "
                "guider or of Attune Noise."
            )
        chosen = next((i for i, cond in enumerate(conds) if not _is_for_a_part(cond)), 0)
        if len(conds) > 1:
            LOG.info("%s: of %d prompts it reads number %d.", WHO, len(conds), chosen + 1)
        cond = conds[chosen]
        tokens = cond.get("cross_attn")
        if config.text == "flat" and tokens is not None and tokens.ndim == 3 and tokens.shape[1] > config.tokens:
            LOG.info("%s: the prompt has %d tokens; %s of %d.", WHO, tokens.shape[1], long_prompt, config.tokens)
        return prompt_texts(config, tokens, cond.get("pooled_output"), long_prompt)


def _is_for_a_part(cond: dict) -> bool:
    """Whether a prompt is one for a part of the picture or of the run."""
    return any(cond.get(name) is not None for name in ("area", "mask")) or cond.get("start_percent", 0) > 0
