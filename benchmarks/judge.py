"""The judge: a small classifier of the demo data that says what a picture shows. Never the network being judged.

It saw the training pictures with blur, noise and colour shifts, and no generated picture. `training/train_judge.py`
makes it; `benchmarks/judge.safetensors` holds it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
VOCABULARY = json.loads((HERE.parent / "training" / "vocabulary.json").read_text("utf-8"))
OBJECTS, BACKGROUNDS = list(VOCABULARY["objects"]), VOCABULARY["backgrounds"]
SIDE, FEATURES = 64, 256


def _stage(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.GroupNorm(8, n_out), nn.SiLU())


class Judge(nn.Module):
    """[b 3 h w] in 0..1 -> features [b 256] and the logits of the objects [b 128]."""

    def __init__(self, objects: int = len(OBJECTS)):
        super().__init__()
        self.body = nn.Sequential(
            _stage(3, 32), _stage(32, 64), nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            _stage(64, 128), nn.Conv2d(128, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.SiLU(), _stage(128, 192),
        )  # fmt: skip
        self.neck = nn.Linear(192 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, objects)

    @staticmethod
    def fit(pictures: Tensor) -> Tensor:
        """The pictures at the side that the judge knows."""
        return pictures if pictures.shape[-1] == SIDE else F.interpolate(pictures, (SIDE, SIDE), mode="area")

    def features(self, pictures: Tensor) -> Tensor:
        return self.neck(self.body(self.fit(pictures) * 2 - 1).flatten(1))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pictures)
        return features, self.head(F.silu(features))


def load_judge() -> Judge:
    judge = Judge()
    with safe_open(HERE / "judge.safetensors", framework="pt") as file:
        judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return judge.eval().requires_grad_(False)


def corner_colours(pictures: Tensor) -> Tensor:
    """Median colour of the four corners (an eighth of the side each): [b 3 h w] -> [b 3] in 0..1."""
    n = pictures.shape[-1] // 8
    parts = [pictures[:, :, y, x].flatten(2) for y in (slice(n), slice(-n, None)) for x in (slice(n), slice(-n, None))]
    return torch.cat(parts, dim=2).median(dim=2).values


def nearest_background(pictures: Tensor) -> Tensor:
    """Index of the palette colour nearest to the corners, [b]."""
    return nearest_colour(corner_colours(pictures))


def nearest_colour(colours: Tensor) -> Tensor:
    """[b 3] in 0..1 -> index of the nearest background, [b]."""
    return torch.cdist(colours, torch.tensor(list(BACKGROUNDS.values())) / 255).argmin(dim=1)
