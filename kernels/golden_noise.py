"""Golden noise on any size: how much of it, and how a network for one size serves another without resizing noise."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from .types import Latent

Refine = Callable[[Latent], Latent]  # noise [1 c side side] -> golden noise of the same shape


def mix(noise: Latent, golden: Latent, strength: float) -> Latent:
    """noise + strength * (golden - noise): 0 is the noise and 1 the golden noise, to the bit."""
    if strength == 0:
        return noise
    return golden if strength == 1 else noise + strength * (golden - noise)


def refine_in_windows(noise: Latent, side: int, refine: Refine) -> Latent:
    """Golden noise of one sample [1 c h w] of any size from a network for side x side.

    Noise is white at its own size only, so it is never resized. Larger: evenly spaced windows, whose *corrections*
    are blended with ramps that sum to 1. Smaller: more noise around it, drawn from a seed that the sample gives.
    """
    h, w = noise.shape[-2:]
    if (h, w) == (side, side):
        return refine(noise)
    padded = _pad(noise, side)
    correction = torch.zeros_like(padded)
    rows, columns = (windows(n, side, noise) for n in padded.shape[-2:])
    for (top, tall), (left, wide) in product(rows, columns):
        here = (..., slice(top, top + side), slice(left, left + side))
        window = padded[here]
        correction[here] += (refine(window) - window) * tall[:, None] * wide
    return noise + correction[..., :h, :w]


def windows(length: int, side: int, like: Tensor) -> list[tuple[int, Tensor]]:
    """Start and weights [side] of the evenly spaced windows over an axis; the weights of a place sum to 1."""
    n = -(-length // side)
    starts = [round(i * (length - side) / (n - 1)) for i in range(n)] if n > 1 else [0]
    weights = [torch.ones(side, dtype=like.dtype, device=like.device) for _ in starts]
    for i in range(1, n):
        overlap = starts[i - 1] + side - starts[i]
        ramp = (torch.arange(overlap, dtype=like.dtype, device=like.device) + 0.5) / max(overlap, 1)
        weights[i][:overlap] *= ramp
        weights[i - 1][side - overlap :] *= 1 - ramp
    return list(zip(starts, weights, strict=True))


def noise_seed(noise: Latent) -> int:
    """A seed that the numbers of a sample give, the same alone and in a batch."""
    return zlib.crc32(noise.detach().float().cpu().contiguous().numpy().tobytes())


def _pad(noise: Latent, side: int) -> Latent:
    """At least side x side, more noise below and to the right."""
    h, w = noise.shape[-2:]
    if h >= side and w >= side:
        return noise
    generator = torch.Generator().manual_seed(noise_seed(noise))
    size = (*noise.shape[:-2], max(h, side), max(w, side))
    padded = torch.randn(size, generator=generator).to(noise)
    padded[..., :h, :w] = noise
    return padded
