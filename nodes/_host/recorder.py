"""A run as it passes by: its states and what the guided model said of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.space import NoiseSpace
from ...kernels.timestep_aligner import Trajectory
from .identity import identify

MOST_RECORDED = 4 << 30  # bytes of main memory; 50 steps of a picture of SDXL take 26 MB, of a long video 2 GB


class Recorder:
    """A guider that keeps, in main memory, what it is first asked at each level of a schedule and what it says."""

    def __init__(self, guider: Any, sigmas: Tensor):
        self._guider, self._sigmas = guider, sigmas
        self._states: list[Tensor] = []
        self._answers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        answer = self._guider(x, sigma, *args, **kwargs)
        at, steps = len(self._states), len(self._sigmas) - 1
        if at < steps and 8 * steps * x.numel() <= MOST_RECORDED:
            level, wanted = float(sigma.reshape(-1)[0]), float(self._sigmas[at])
            if abs(level - wanted) <= max(1e-4, torch.finfo(sigma.dtype).eps) * wanted:  # of a half, rounded
                self._states.append(x.detach().float().cpu())
                self._answers.append(answer.detach().float().cpu())
        return answer

    def path(self, end: Tensor) -> Trajectory | None:
        """The run to its `end`; None where it did not pass by every level, or was too large."""
        if len(self._states) != len(self._sigmas) - 1:
            return None
        space = NoiseSpace(identify(self._guider.model_patcher).space)
        scaled = end.float().cpu() * space.alpha(self._sigmas[-1].double().cpu()).float()
        return Trajectory.recorded(self._sigmas.double().cpu(), [*self._states, scaled], self._answers)
