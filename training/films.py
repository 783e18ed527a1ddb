"""Films of emoji that move and turn before a background that may change: the training data of the demo video model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64  # pixels
FRAMES = 8  # frames that the model sees at once
OBJECTS = ("red apple", "banana", "mushroom", "cat", "panda", "frog")


@dataclass(frozen=True)
class Motion:
    """How the objects of b films move; lengths in halves of the frame, angles in radians, times in frames."""

    fill: Tensor  # [b] size of the object, as a part of the frame
    start: Tensor  # [b 2] phase of the way to and fro, 0..4 for one whole
    speed: Tensor  # [b 2] a frame
    swing: Tensor  # [b] largest angle
    phase: Tensor  # [b] of the swing
    period: Tensor  # [b] of the swing
    fade: Tensor  # [b] phase a frame of the background from its first colour to its second and back; 0: stays


def draw_motion(b: int, generator: torch.Generator) -> Motion:
    """Random motions: half swing, 40 % have a background that fades."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(b, *shape).uniform_(low, high, generator=generator)

    swing = between(0.25, 0.75) * (between(0, 1) < 0.5)
    fade = 2 * math.pi / between(10, 24) * (between(0, 1) < 0.4)
    return Motion(
        between(0.55, 0.7), between(0, 4, 2), between(-0.16, 0.16, 2), swing, between(0, 2 * math.pi), between(8, 20),
        fade,
    )  # fmt: skip


def shown(rgba: Tensor, motion: Motion, colours: tuple[Tensor, Tensor], frames: int) -> Tensor:
    """Films [b frames 3 SIDE SIDE] in 0..1. rgba: premultiplied uint8 [b 4 h w]; colours: first and second, [b 3]."""
    b = len(rgba)
    small = F.interpolate(rgba.float() / 255, (SIDE, SIDE), mode="area")
    t = torch.arange(frames)
    way = motion.start[:, None] + motion.speed[:, None] / (1 - motion.fill)[:, None, None] * t[:, None]  # [b f 2]
    place = (1 - motion.fill)[:, None, None] * ((way % 4 - 2).abs() - 1)  # a triangle wave: it bounces off the edges
    angle = motion.swing[:, None] * torch.sin(motion.phase[:, None] + 2 * math.pi * t / motion.period[:, None])
    c, s = angle.cos() / motion.fill[:, None], angle.sin() / motion.fill[:, None]
    turn = torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2)  # [b f 2 2]
    theta = torch.cat([turn, -turn @ place[..., None]], dim=-1).flatten(0, 1)
    grid = F.affine_grid(theta, [b * frames, 4, SIDE, SIDE], align_corners=False)
    placed = F.grid_sample(small.repeat_interleave(frames, 0), grid, align_corners=False).unflatten(0, (b, frames))
    share = ((1 - torch.cos(motion.fade[:, None] * t)) / 2)[:, :, None]
    colour = (1 - share) * colours[0][:, None] + share * colours[1][:, None]
    return placed[:, :, :3] + (1 - placed[:, :, 3:]) * colour[..., None, None]
