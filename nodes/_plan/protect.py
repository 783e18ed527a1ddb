"""Which masks are for which picture, and what a protection came to, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masks_for(count: int, masks: Tensor) -> list[Tensor]:
    """The masks [n h w] of each of `count` pictures: one each where there are as many, else all of them for each."""
    return list(masks.split(1)) if len(masks) == count > 1 else [masks] * count


def memory_said(weights: int, once: int) -> str:
    """What the copies and one iteration take, from their bytes."""
    return f"up to about {weights / 1e9:.2f} GB for copies of the networks and {once / 1e9:.2f} GB while it works"


def protection_report(pictures: Sequence[Tensor], found: Sequence[tuple[Tensor, float, float]], memory: str) -> str:
    """A line a picture: how much changed, how visibly, and what it did to the first call; then what it is worth."""
    lines = []
    for i, (before, (after, first, last)) in enumerate(zip(pictures, found, strict=True)):
        change = (after - before).abs() * 255
        error = (change / 255).square().mean()
        psnr = f"{float(-10 * torch.log10(error)):.1f} dB" if error > 0 else "unchanged"
        share = float((change > 0.5).any(1).float().mean())
        lines.append(
            f"Picture {i + 1}: first prediction {first:.4g} -> {last:.4g}; at most {float(change.max()):.0f} of "
            f"255 grey levels on {100 * share:.0f} % of the pixels; PSNR {psnr}."
        )
    lines.append(f"Memory: {memory}.")
    lines.append(
        "It is made for editors that inpaint with this model or its kin; JPEG, blur, resizing and other editors can "
        "weaken or undo it. Save the picture without loss (PNG), and look at edits of it."
    )
    return "\n".join(lines)
