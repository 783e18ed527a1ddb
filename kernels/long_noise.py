"""Noise for films longer than a model's window: the first window is random, the next ones are made of its frames.

FreeNoise (Qiu et al. 2023, arXiv 2310.15169), whose local shuffle BlockVid (Zhang et al. 2025, arXiv 2511.22973) uses
between its blocks too: windows that share their noises show the same scene, and each frame's noise stays white, for it
is a drawn one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled_frames(frames: int, window: int, stride: int, generator: torch.Generator) -> Tensor:
    """Which drawn frame each frame [f] takes: the first `window` their own, then `stride` at a time those that stand a
    window before, in random order."""
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(
            f"A window of {window} frames cannot move on by {stride}: 1 to {max(window, 1)} can be asked for."
        )
    order = list(range(min(window, frames)))
    while len(order) < frames:
        before = order[len(order) - window : len(order) - window + stride]
        order += [before[i] for i in torch.randperm(stride, generator=generator).tolist()]
    return torch.tensor(order[:frames])
