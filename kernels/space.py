"""The two conventions for noise levels, and the angle that means the same corruption in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .types import Sigma


@dataclass(frozen=True)
class NoiseSpace:
    """x = alpha(sigma) * x0 + sigma * eps, with alpha = 1 ("ve": SD, SDXL) or 1 - sigma ("flow": SD3, Flux)."""

    kind: Literal["ve", "flow"]

    def alpha(self, sigma: Sigma) -> Sigma:
        return torch.ones_like(sigma) if self.kind == "ve" else 1 - sigma

    def angle(self, sigma: Sigma, c: float = 1.0) -> Sigma:
        """theta = atan2(sigma, c * alpha): 0 without noise, pi/2 for nothing but noise.

        For data of standard deviation `c`, tan(theta) is the ratio of the noise's to the signal's standard deviation.
        """
        return torch.atan2(sigma, c * self.alpha(sigma))

    def at_angle(self, theta: Sigma, c: float = 1.0) -> Sigma:
        """The sigma whose angle is `theta`; the inverse of `angle`."""
        if self.kind == "ve":
            return c * torch.tan(theta)
        return c * torch.sin(theta) / (c * torch.sin(theta) + torch.cos(theta))

    def log_ratio(self, sigma: Sigma) -> Sigma:
        """ln(sigma / alpha), minus half the log-SNR: ln(sigma) on VE, logit(sigma) on flow; -inf without noise.

        inf for a flow's 1, where there is no signal, and for levels above, which only a hand-made schedule has.
        """
        return sigma.log() if self.kind == "ve" else torch.logit(sigma.clamp(max=1))

    def at_log_ratio(self, log_ratio: Sigma) -> Sigma:
        """The sigma whose ln(sigma / alpha) is `log_ratio`; the inverse of `log_ratio`."""
        return log_ratio.exp() if self.kind == "ve" else log_ratio.sigmoid()
