"""A run as it passes by: its states and what the guided model said of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.timestep_aligner import Trajectory
from .identity import identify

MOST_RECORDED = 4 << 30  # bytes of main memory; 50 steps of a picture of SDXL take 26 MB, of a long video 2 GB


class Recorder:
    """A guider that keeps, in main memory, what it is last asked at each level of a schedule and what it says.

    The last, for a solver of second order asks at the next level once to try it, and again when it is there.
    """

    def __init__(self, guider: Any, sigmas: Tensor):
        self._guider, self._sigmas = guider, sigmas
        self._levels = sigmas.tolist()[:-1]
        self._heard: dict[int, tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        answer = self._guider(x, sigma, *args, **kwargs)
        if 8 * len(self._levels) * x.numel() <= MOST_RECORDED:
            level, near = float(sigma.reshape(-1)[0]), max(1e-4, torch.finfo(sigma.dtype).eps)  # of a half, rounded
            close = [i for i, one in enumerate(self._levels) if abs(level - one) <= near * one]
            if close:  # several that a half cannot tell apart come in turn
                i = next((i for i in close if i not in self._heard), close[-1])
                self._heard[i] = x.detach().float().cpu(), answer.detach().float().cpu()
        return answer

    def path(self, end: Tensor) -> Trajectory | None:
        """The run to its `end`; None where it did not pass by every level, or was too large."""
        if len(self._heard) != len(self._levels):
            return None
        states, answers = zip(*(self._heard[i] for i in range(len(self._levels))), strict=True)
        space = identify(self._guider.model_patcher).noise_space
        scaled = end.float().cpu() * space.alpha(self._sigmas[-1].double().cpu()).float()
        return Trajectory.recorded(self._sigmas.double().cpu(), [*states, scaled], answers)
