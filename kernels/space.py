"""The two conventions for noise levels, and the angle that means the same corruption in both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .types import Sigma


@dataclass(frozen=True)
class NoiseSpace:
    """x = alpha(sigma) * x0 + sigma * scale * eps, with alpha = 1 ("ve": SD, SDXL) or 1 - sigma ("flow": SD3, Flux).

    scale: the standard deviation of the noise that a flow model was trained on, 1 for most, 8 for HiDream-O1.
    """

    kind: Literal["ve", "flow"]
    scale: float = 1.0

    def alpha(self, sigma: Sigma) -> Sigma:
        return torch.ones_like(sigma) if self.kind == "ve" else 1 - sigma

    def angle(self, sigma: Sigma, c: float = 1.0) -> Sigma:
        """theta = atan2(sigma * scale, c * alpha): 0 without noise, pi/2 for nothing but noise.

        For data of standard deviation `c`, tan(theta) is the ratio of the noise's to the signal's standard deviation.
        """
        return torch.atan2(sigma * self.scale, c * self.alpha(sigma))

    def at_angle(self, theta: Sigma, c: float = 1.0) -> Sigma:
        """The sigma whose angle is `theta`; the inverse of `angle`."""
        c = c / self.scale
        if self.kind == "ve":
            return c * torch.tan(theta)
        return c * torch.sin(theta) / (c * torch.sin(theta) + torch.cos(theta))

    def log_ratio(self, sigma: Sigma) -> Sigma:
        """ln(sigma * scale / alpha), minus half the log-SNR: ln(sigma) on VE, logit(sigma) on flow; -inf without noise.

        inf for a flow's 1, where there is no signal, and for levels above, which only a hand-made schedule has.
        """
        return (sigma.log() if self.kind == "ve" else torch.logit(sigma.clamp(max=1))) + math.log(self.scale)

    def at_log_ratio(self, log_ratio: Sigma) -> Sigma:
        """The sigma whose ln(sigma * scale / alpha) is `log_ratio`; the inverse of `log_ratio`."""
        log_ratio = log_ratio - math.log(self.scale)
        return log_ratio.exp() if self.kind == "ve" else log_ratio.sigmoid()
