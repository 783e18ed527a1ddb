"""A NOISE of which later windows are local permutations of the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.long_noise import shuffled_frames
from .latents import refuse_nested


@dataclass(frozen=True)
class LongNoise:
    """As the host asks a NOISE. Films of one window, and their batch, get the inner noise as it is."""

    noise: Any
    window: int
    stride: int

    @property
    def seed(self) -> int:
        return self.noise.seed

    def generate_noise(self, input_latent: dict) -> Tensor:
        refuse_nested(input_latent["samples"], "latent_image", "a latent of one film")
        drawn = self.noise.generate_noise(input_latent)
        if drawn.ndim != 5:
            raise ValueError(
                "Attune Long-Video Noise: the latent must be a film, [batch, channels, frames, height, width], but it "
                f"is {list(drawn.shape)}."
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = shuffled_frames(drawn.shape[2], self.window, self.stride, generator)
        return drawn[:, :, order]
