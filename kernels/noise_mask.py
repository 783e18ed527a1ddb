"""How much noise each region of a picture needs: masks for Differential Diffusion, whose values are shares of the run.

Noise of another size at each pixel breaks a network that reads one timestep. Differential Diffusion (Levin and Fried
2023, arXiv 2306.00950) has each pixel join the one run later instead: what joins when the noise has fallen to its level
has had that much noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .space import NoiseSpace
from .types import Sigma

SATURATED = 0.1  # of the range of pictures: a difference that counts in full (UPSR)


def uncertainty(one: Tensor, other: Tensor) -> Tensor:
    """How little two restorations [b h w c] in 0..1 agree, [b h w] in 0..1: UPSR's law (Zhang et al. 2025, arXiv
    2503.18512), clip(|difference|, 0, 0.1) / 0.1, here of the mean over colours."""
    return (one - other).abs().mean(dim=-1).clamp(0, SATURATED) / SATURATED


def edges(picture: Tensor, factor: int = 4) -> Tensor:
    """How much of a picture [b h w c] a reduction by `factor` loses, as `uncertainty`: near 1 at edges and texture."""
    x = picture.movedim(-1, 1)
    small = [max(n // factor, 1) for n in x.shape[2:]]
    back = F.interpolate(F.interpolate(x, small, mode="area"), x.shape[2:], mode="bicubic")
    return uncertainty(picture, back.clamp(0, 1).movedim(1, -1))


def with_floor(share: Tensor, floor: float) -> Tensor:
    """floor + (1 - floor) share: even what is certain gets some noise (UPSR: 0.4)."""
    return floor + (1 - floor) * share


def of_holes(holes: Tensor, kept: float, feather: int = 0) -> Tensor:
    """All of the noise in the holes [b h w] of a warped picture, `kept` of it elsewhere, over `feather` pixels.

    WorldWarp (Kong et al. 2025, arXiv 2512.19678) has full noise in blank regions and a part in warped ones.
    """
    wide = holes[:, None]
    if feather > 0:
        blur, grow = feather // 2, feather - feather // 2  # so that holes keep all
        grown = F.max_pool2d(wide, 2 * grow + 1, stride=1, padding=grow)
        wide = F.avg_pool2d(grown, 2 * blur + 1, stride=1, padding=blur, count_include_pad=False)
    return with_floor(wide[:, 0], kept)


def time_share(
    strength: Tensor, start: float, end: float, space: NoiseSpace, timestep: Callable[[Sigma], Tensor]
) -> Tensor:
    """Mask values, the share of the run's timesteps at which a pixel joins, for `strength` of the first level's noise.

    The ratio of noise to signal is scaled: sigma' = w sigma for SD and SDXL, w sigma / (1 - sigma + w sigma) for flow
    models.
    start, end: the run's first level and the last one above 0. timestep: the model's, of a level.
    """
    ratio = space.log_ratio(
        torch.tensor(start, dtype=torch.float64).clamp(max=1 - 1e-6 if space.kind == "flow" else 1e9)
    )
    levels = space.at_log_ratio(ratio + strength.double().clamp(min=1e-9).log())
    first, last = (float(timestep(torch.tensor([level]))) for level in (start, end))
    share = (timestep(levels.flatten().float()).double().reshape(strength.shape) - last) / (first - last)
    return torch.where(strength >= 1, 1.0, share.clamp(0, 1)).float()
