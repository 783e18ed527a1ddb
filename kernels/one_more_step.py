"""One More Step (Hu et al., CVPR 2024, arXiv 2311.15744): begin from the noise that the model was trained on.

In training the noisiest state still holds a trace of the picture, x0 + sigma_max eps; sampling begins without it. The
trace is faint in a pixel but not in the mean of N pixels, where its power is N tau^2 / sigma_max^2 (tau: the spread of
that mean over the data), so the model takes the missing trace for medium grey. The method puts back E[x0 | c], which a
small network predicts; `SignalLeak` puts back a random draw of it (Everaert et al., WACV 2024, arXiv 2309.15842).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import Latent

NOISE_LEVELS: dict[str, Callable[[float], float]] = {  # sigma -> how much noise the first state holds
    "exact": lambda sigma: sigma,  # the forward process from x0
    "official": lambda sigma: sigma**2 / math.sqrt(1 + sigma**2),  # the authors' code: a variance in place of a std
    "unit": lambda sigma: math.sqrt(1 + sigma**2),  # as samplers begin from nothing but noise
}


def clean_of_v(v: Tensor) -> Latent:
    """The clean latent that v stands for without any signal: v = sqrt(ab) eps - sqrt(1 - ab) x0 at ab = 0."""
    return -v


def guided(cond: Latent, uncond: Latent, cfg_scale: float) -> Latent:
    """Classifier-free guidance: 0 is `uncond`, 1 `cond`, more goes beyond."""
    return torch.lerp(uncond, cond, cfg_scale)


def first_state(x0: Latent, noise: Tensor, sigma: float, level: str = "exact") -> Latent:
    """Where to begin at `sigma`: the prediction x0 under as much unit `noise` as NOISE_LEVELS[level] says."""
    return x0 + NOISE_LEVELS[level](sigma) * noise


def noise_for(
    state: Latent, noise: Tensor, scale: float, latent: Tensor | float = 0.0, mask: Tensor | float = 1.0,
    strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """The noise with which a sampler that begins at scale * noise + latent begins at `state` instead.

    mask: 1 where to do so, 0 where `noise` stays, which inpainting needs there for the kept region. strength: 0 is
    `noise`, 1 `state`, in a straight line.
    """
    return noise + strength * (mask * ((state - latent) / scale - noise))


def keyed_noise(noise: Tensor, purpose: str = "") -> Tensor:
    """Unit noise of the shape [b ...] of `noise`, each item drawn from a seed that its own values make.

    So it is the same wherever an item stands in a batch, independent of `noise` and of other purposes, and no random
    state is read or moved.
    """
    draw = lambda item: torch.randn(item.shape, generator=torch.Generator().manual_seed(_seed_of(item, purpose)))
    return torch.stack([draw(item) for item in noise]).to(noise)


def _seed_of(noise: Tensor, purpose: str) -> int:
    """A seed from at most 256 sums of every 256th value, at unit variance and rounded.

    Not from the bits: randn's differ by an ulp between processors, and the noise drawn here would be another one. A sum
    lies so near to a tie once in some ten million; zeros of either sign lie far from one.
    """
    values = noise.detach().cpu().double().flatten()
    rows = torch.nn.functional.pad(values, (0, -len(values) % 256)).reshape(-1, 256)
    content = (rows.sum(0) / math.sqrt(len(rows))).round().clamp(-99, 99).to(torch.int8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content + purpose.encode()).digest()[:8], "little") & (2**63 - 1)


def v_loss(network: Callable[[Tensor, Tensor], Tensor], x0: Latent, cond: Tensor, noise: Tensor) -> Tensor:
    """What the network minimises: mean (v + x0)^2, v from nothing but noise and the condition.

    Its least value is the data's variance within a condition, not 0: there the network says E[x0 | c] for any noise.
    """
    return (network(noise, cond).float() + x0).square().mean()


@dataclass(frozen=True)
class SignalLeak:
    """A Gaussian of clean latents: all low cosine frequencies together, white above them.

    mean: [c k k], amplitudes of the k x k lowest frequencies; the first is the channel's mean over the picture, at any
    picture size. root: [c*k*k c*k*k], root @ root.T is their covariance. rest: [c], std of what lies above.
    """

    mean: Tensor
    root: Tensor
    rest: Tensor

    @classmethod
    def fit(cls, latents: Latent, frequencies: int = 3) -> SignalLeak:
        """From example latents [n c h w], n >= 2: exact mean and covariance of their low frequencies."""
        if latents.ndim != 4 or len(latents) < 2:
            raise ValueError(
                f"A signal leak needs at least 2 example latents [n c h w], but their shape is {list(latents.shape)}."
            )
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("The examples are not finite numbers everywhere: leave out the broken ones.")
        x = latents.double()
        amplitudes = _analyse(x, frequencies)
        away = (amplitudes - amplitudes.mean(0)).flatten(1)  # [n c*k*k]
        values, vectors = torch.linalg.eigh(away.T @ away / (len(x) - 1))
        above = x - _synthesise(amplitudes, *x.shape[2:])
        waves_above = max(math.prod(x.shape[2:]) - frequencies**2, 1)  # of a channel; the low ones are taken out
        rest = (above - above.mean(0)).square().sum((0, 2, 3)) / ((len(x) - 1) * waves_above)
        root = vectors * values.clamp(min=0).sqrt()
        return cls(amplitudes.mean(0).float(), root.float(), rest.sqrt().float())

    @property
    def channels(self) -> int:
        return self.mean.shape[0]

    @property
    def frequencies(self) -> int:
        return self.mean.shape[1]

    def mean_latent(self, height: int, width: int) -> Latent:
        """The mean picture [1 c h w], low frequencies only."""
        return _synthesise(self.mean[None], height, width)

    def residual(self, white: Tensor) -> Latent:
        """Unit noise [b c h w] -> a draw of what examples differ by from their mean, at the size of `white`."""
        if white.shape[1] != self.channels:
            raise ValueError(
                f"The signal leak has {self.channels} channels, but the latent has {white.shape[1]}: fit it to latents "
                "of this model."
            )
        height, width = white.shape[2:]
        unit = _analyse(white, self.frequencies) * math.sqrt(height * width)  # unit normal
        drawn = (unit.flatten(1) @ self.root.to(white).T).reshape_as(unit)
        above = white - _synthesise(unit / math.sqrt(height * width), height, width)
        return _synthesise(drawn, height, width) + self.rest.to(white)[:, None, None] * above


def _waves(frequencies: int, length: int, like: Tensor) -> Tensor:
    """The lowest cosines (DCT-II) over `length` places, mean square 1, [frequencies length]."""
    if length < frequencies:
        raise ValueError(
            f"A side of {length} latent pixels has no {frequencies} frequencies: use larger latents or fewer of them."
        )
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    waves = torch.cos(torch.pi * torch.arange(frequencies, dtype=torch.float64)[:, None] * place)
    return (waves / waves.square().mean(1, keepdim=True).sqrt()).to(like)


def _analyse(x: Latent, k: int) -> Tensor:
    """The amplitudes [b c k k] of the low frequencies of x [b c h w]."""
    height, width = x.shape[2:]
    vertical, horizontal = _waves(k, height, x) / height, _waves(k, width, x) / width
    return torch.einsum("ph,bchw,qw->bcpq", vertical, x, horizontal)


def _synthesise(amplitudes: Tensor, height: int, width: int) -> Latent:
    """The latent [b c h w] that has nothing but these amplitudes [b c k k]."""
    k = amplitudes.shape[-1]
    return torch.einsum("ph,bcpq,qw->bchw", _waves(k, height, amplitudes), amplitudes, _waves(k, width, amplitudes))
