"""What a trainer asks of a MODEL's noise levels, answered in another way while it trains, and never else.

The host's Train LoRA draws a level as `model_sampling.percent_to_sigma(uniform)` and a noisy picture as
`model_sampling.noise_scaling(sigma, noise, latent)`, inside a run of a Sampler of its own. A wrapper around that run
hands it a guider whose model_sampling answers both in our way: nothing is written into the MODEL, runs that sample
stay as they are, and a curriculum begins anew with each training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.training_noise import Levels, TimestepDensity, assign, nearest, quantile, stage_now, stages
from .clock import noise_space

LOG = logging.getLogger(__name__)
KEY = "attune.training_noise"
WHO = "Attune Training Noise"
COUNTED = 1000  # of the training time, each with one level
AS_DRAWN, BATCH, NEAREST = "as drawn", "immiscible batch", "nearest of several"
PAIRINGS = [AS_DRAWN, BATCH, NEAREST]


@dataclass(frozen=True)
class TrainingNoise:
    """Which levels are drawn how often, and which noise: `draws` for "nearest of several"."""

    density: TimestepDensity
    pairing: str = AS_DRAWN
    draws: int = 4

    @property
    def is_stock(self) -> bool:
        as_drawn = self.pairing == AS_DRAWN or (self.pairing == NEAREST and self.draws == 1)
        return self.density.is_stock and as_drawn


def with_training_noise(model: Any, choice: TrainingNoise) -> Any:
    """A clone of MODEL for a trainer; MODEL itself where nothing is chosen."""
    if choice.is_stock:
        return model
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _Trains(choice))
    return clone


def levels_of(sampling: Any) -> Levels:
    """The levels at the middles of equal parts of a model_sampling's training time."""
    places = [(i + 0.5) / COUNTED for i in range(COUNTED)]
    sigma = torch.tensor([float(sampling.percent_to_sigma(place)) for place in places])
    gain = sampling.calculate_denoised(sigma, torch.ones(COUNTED, 1), torch.zeros(COUNTED, 1)).abs().flatten()
    return Levels(sigma, gain.cpu(), noise_space(sampling))


class Overlaid:
    """`real` with some attributes replaced; what is called or set reaches the real one."""

    def __init__(self, real: Any, **replaced: Any):
        self.__dict__.update(_real=real, **replaced)

    def __call__(self, *args, **kwargs):
        return self._real(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any):
        setattr(self._real, name, value)


@dataclass(frozen=True)
class _Trains:
    """SAMPLER_SAMPLE: a run whose sampler has an optimizer is one that trains."""

    choice: TrainingNoise

    def __call__(self, executor, guider, sigmas, extra_args, *args, **kwargs):
        if not hasattr(executor.class_obj, "optimizer"):
            LOG.info("%s: this run samples and trains nothing, so nothing changes.", WHO)
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        drawing = _Drawing(self.choice, guider.inner_model.model_sampling, extra_args.get("seed") or 0)
        model = Overlaid(guider.inner_model, model_sampling=drawing.sampling)
        try:
            return executor(Overlaid(guider, inner_model=model), sigmas, extra_args, *args, **kwargs)
        finally:
            LOG.info("%s: %s", WHO, drawing.said)


class _Drawing:
    """The draws of one training."""

    def __init__(self, choice: TrainingNoise, sampling: Any, seed: int):
        self.choice, self.real, self.drawn, self.paired = choice, sampling, 0, 0
        self.nearer, self.farther = 0.0, 0.0  # squared distances of what is taken, and of what the trainer drew
        self.generator = torch.Generator().manual_seed((seed + 1) % 2**63)
        self.sampling = Overlaid(sampling, percent_to_sigma=self.percent_to_sigma, noise_scaling=self.noise_scaling)
        self.places: list[Callable[[float], float]] = []
        if not choice.density.is_stock:
            self.places = [quantile(shares) for shares in stages(choice.density, levels_of(sampling))]

    def percent_to_sigma(self, percent: float) -> float:
        if not self.places:
            self.drawn += 1
            return self.real.percent_to_sigma(percent)
        place = self.places[stage_now(self.drawn, self.choice.density.planned, len(self.places))](percent)
        self.drawn += 1
        return self.real.percent_to_sigma(min(max(place, 1e-6), 1 - 1e-6))  # the ends are no levels to the host

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, *args, **kwargs) -> Tensor:
        """The noisy picture; without noise the picture itself, which a trainer compares with."""
        chosen = noise
        if self.choice.pairing != AS_DRAWN and noise.any():
            chosen = assign(latent, noise) if self.choice.pairing == BATCH else self._nearest(latent, noise)
            self.paired += len(noise)
            self.nearer += float((chosen - latent).float().square().sum())
            self.farther += float((noise - latent).float().square().sum())
        return self.real.noise_scaling(sigma, chosen, latent, *args, **kwargs)

    def _nearest(self, latent: Tensor, noise: Tensor) -> Tensor:
        draw = lambda: torch.randn(noise.shape, generator=self.generator).to(noise)
        return nearest(latent, noise, self.choice.draws, draw)

    @property
    def said(self) -> str:
        if not self.drawn:
            return "this trainer asks the MODEL for no noise level, so nothing changed. It works with Train LoRA."
        pairing = ""
        if self.paired:
            less = 1 - (self.nearer / self.farther) ** 0.5
            pairing = f"; noise and picture lie {less:.2%} nearer than as drawn"
        return f"{self.drawn} noise levels drawn by '{self.choice.density.kind}'{pairing}."
