"""Emoji pictures on plain backgrounds: the training data of the demo models, composed on the fly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

VOCABULARY = json.loads(
    Path(os.environ.get("ATTUNE_VOCABULARY", Path(__file__).parent / "vocabulary.json")).read_text("utf-8")
)
OBJECTS: dict[str, str] = VOCABULARY["objects"]  # name -> file stem (Unicode code points)
BACKGROUNDS: dict[str, list[int]] = VOCABULARY["backgrounds"]  # name -> sRGB 0..255
OBJECT_NAMES, BACKGROUND_NAMES = list(OBJECTS), list(BACKGROUNDS)
SIDE = 128  # native side of the demo models in pixels


def load_rgba(path: Path, side: int = SIDE) -> np.ndarray:
    """One emoji as premultiplied RGBA, uint8 [side side 4]."""
    image = Image.open(path).convert("RGBA").resize((side, side), Image.LANCZOS)
    rgba = np.asarray(image, dtype=np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return rgba.round().astype(np.uint8)


def load_objects(assets: Path) -> torch.Tensor:
    """The vocabulary's pictures in its order, uint8 [objects 4 SIDE SIDE]."""
    stack = np.stack([load_rgba(assets / f"{stem}.webp") for stem in OBJECTS.values()])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def load_everything(assets: Path, cache: Path) -> torch.Tensor:
    """All pictures of the package (for the autoencoder), uint8 [n 4 SIDE SIDE], cached as one array."""
    if not cache.exists():
        stack = np.stack([load_rgba(path) for path in sorted(assets.glob("*.webp"))])
        np.save(cache, stack.transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(cache))


def background_colours() -> torch.Tensor:
    """[backgrounds 3] in 0..1."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


def compose(rgba: torch.Tensor, colour: torch.Tensor, generator: torch.Generator, side: int = SIDE) -> torch.Tensor:
    """Place premultiplied pictures on plain backgrounds with a random size and position.

    rgba: uint8 [b 4 h w]; colour: [b 3] in 0..1. Returns [b 3 side side] in 0..1. The object fills 74 to
    88 % of the frame.
    """
    b = len(rgba)
    fill = torch.empty(b).uniform_(0.74, 0.88, generator=generator)
    shift = torch.empty(b, 2).uniform_(-0.08, 0.08, generator=generator)
    placed = place(rgba, fill, shift, side)
    return placed[:, :3] + (1 - placed[:, 3:]) * colour[:, :, None, None]


def place(rgba: torch.Tensor, fill: torch.Tensor, shift: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Premultiplied pictures uint8 [b 4 h w], made `fill` [b] of the frame and shifted: [b 4 side side] in 0..1.

    shift: [b 2], how far to the left and up, in halves of the picture's own size.
    """
    theta = torch.zeros(len(rgba), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / fill
    theta[:, :, 2] = shift / fill[:, None]
    grid = F.affine_grid(theta, [len(rgba), 4, side, side], align_corners=False)
    return F.grid_sample(rgba.float() / 255, grid, align_corners=False)
