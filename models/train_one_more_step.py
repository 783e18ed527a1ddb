"""Train the network of One More Step: what is learnt in a step, and the sizes there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.one_more_step import v_loss
from .training import Training

MODULE_SIZES = {  # channels and residual blocks per level, the attention is on the lower two; the rate each likes
    "tiny (2.7 M weights)": ((32, 64, 96), 1, 1e-3),
    "small (26 M)": ((96, 192, 384), 1, 3e-4),
    "as published (154 M)": ((160, 320, 640), 2, 1e-4),
}
HIGHEST_DECAY = 0.999  # of the average


class ModuleTraining(Training):
    """AdamW on `v_loss`; a running average of the weights is kept.

    draw: clean latents [b c h w] and their conditions [b tokens width] from a generator on the CPU. The learning rate
    rises over `warm_up` steps and falls to 0 over the last third.
    """

    def __init__(
        self, network: nn.Module, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], made: Mapping[str, Any],
        steps: int, learning_rate: float = 1e-4, warm_up: int = 100, seed: int = 0,
    ):  # fmt: skip
        super().__init__(network, made, steps, learning_rate)
        self.draw, self.warm_up, self.seed = draw, warm_up, seed

    def generator(self) -> torch.Generator:
        """What the coming step draws from, on the CPU."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**64)

    def learn(self) -> float:
        generator = self.generator()
        x0, cond = self.draw(generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        fall = min(1.0, 3 * (self.steps - self.step) / self.steps)
        self.set_rate(min(1.0, (self.step + 1) / self.warm_up) * fall)
        loss = v_loss(self.network, x0, cond, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(HIGHEST_DECAY, (2 + self.step) / (11 + self.step))
        torch._foreach_lerp_(list(self.kept.values()), list(self.network.state_dict().values()), 1 - decay)
        return loss.item()

    @torch.no_grad()
    def say(self, noise: Tensor, cond: Tensor) -> Tensor:
        """v of the kept weights, while the training goes on."""
        return torch.func.functional_call(self.network, self.kept, (noise, cond))
