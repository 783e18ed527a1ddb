"""The roles that tensors play in every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Latent: TypeAlias = Tensor  # [b c h w]: noisy or clean latent, in the model's own scale
Sigma: TypeAlias = Tensor  # [] or [b]: noise level; VE: std of the noise in latent units, flow: 0..1
Sigmas: TypeAlias = Tensor  # [n+1]: the noise levels of an n-step run, decreasing, last may be 0
Denoiser: TypeAlias = Callable[[Latent, Sigma], Latent]  # x, sigma -> estimate of the clean latent
