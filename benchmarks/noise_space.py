"""Are real pictures kept, and edited, better through noise maps than by what people use? Reconstruction, edits, morphs.

python dev.py bench noise_space [--models unet flow] [--pictures 48] [--steps 20]

The real pictures are the demo models' training pictures, composed anew (`dev.py train-demo` fetches them); the judge, who
names objects, never saw a generated one. Everything runs through the host's own SamplerCustom: ours by Attune Invert,
Replay and Morph; img2img by BasicScheduler's denoise; approximate inversion by FlipSigmas and euler; RF inversion (Rout
et al. 2024, arXiv 2410.10792) by its published update. Writes docs/results/noise_space.json, docs/results.md and
docs/noise_space.jpg.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from comfy_process import ROOT, Host
from demo_model import sheet
from harness import ANY, BATCH, CACHE, Lab, counting, prompt
from judge import BACKGROUNDS, OBJECTS, load_judge
from metrics import jackknife, perceptual_distance
from results import DOCS, Table, record

GROUPS = 4  # of seeds, for the standard errors
ASSETS = ROOT / ".host" / "training" / "package" / "assets"
SKIPS = (0.0, 0.1, 0.2, 0.36, 0.5)
STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
CORNER = 8  # an eighth of the side: where no object is
FRAMES = 9


@dataclass(frozen=True)
class Real:
    """Pictures [n 3 h w] in 0..1, their latents [n c h w], and what they show."""

    pictures: Tensor
    latents: Tensor
    objects: list[int]
    backgrounds: list[int]


class Bench:
    """A demo model and real pictures for it."""

    def __init__(self, lab: Lab, model: str, count: int, steps: int):
        self.lab, self.name, self.model, self.steps = lab, model, lab.models[model], steps
        self.judge, self.call = load_judge(), lab.host.call
        self.sigmas = self.levels()
        self.real = self._real(count)

    def _real(self, count: int) -> Real:
        import sys

        sys.path.insert(0, str(ROOT / "training"))
        from data import background_colours, compose, load_objects

        if not ASSETS.is_dir():
            raise SystemExit(
                f"No training pictures in {ASSETS}: `python dev.py train-demo` fetches them; stop it then."
            )
        objects = [37 * i % len(OBJECTS) for i in range(count)]
        backgrounds = [(7 * i + 3) % len(BACKGROUNDS) for i in range(count)]
        generator = torch.Generator().manual_seed(1)
        pictures = compose(load_objects(ASSETS)[objects], background_colours()[backgrounds], generator)
        parts = [
            self.call("VAEEncode", pixels=part.permute(0, 2, 3, 1), vae=self.lab.vaes[self.name])[0]["samples"]
            for part in pictures.split(BATCH)
        ]
        return Real(pictures, torch.cat(parts), objects, backgrounds)

    def levels(self, denoise: float = 1.0) -> Tensor:
        given = {"scheduler": "normal", "steps": self.steps, "denoise": denoise}
        return self.call("BasicScheduler", model=self.model, **given)[0]

    def conds(self, texts: list[str]) -> dict:
        return {"positive": self.lab.conditioning(texts), "negative": self.lab.conditioning([""] * len(texts))}

    def sample(self, latents: Tensor, texts: list[str], cfg: float, sigmas, sampler="euler", seed: int | None = None):
        """The stock SamplerCustom; seed None adds no noise."""
        if isinstance(sampler, str):
            (sampler,) = self.call("KSamplerSelect", sampler_name=sampler)
        return self.call(
            "SamplerCustom", model=self.model, add_noise=seed is not None, noise_seed=seed or 0, cfg=cfg, sampler=sampler,
            sigmas=sigmas, latent_image={"samples": latents}, **self.conds(texts),
        )[0]["samples"]  # fmt: skip

    def invert(self, latents: Tensor, texts: list[str], cfg: float, **more):
        given = {"sigmas": self.sigmas, "cfg": cfg, **self.conds(texts), **more}
        return self.call("AttuneInvert", model=self.model, latent={"samples": latents}, **given)[0]

    def replay(self, maps, texts: list[str], cfg: float, **more) -> Tensor:
        sampler, sigmas, latent, _ = self.call("AttuneReplay", noise_maps=maps, **more)
        return self.sample(latent["samples"], texts, cfg, sigmas, sampler)

    def flipped(self, latents: Tensor, texts: list[str], cfg: float) -> Tensor:
        """Approximate inversion, as people do it: euler over FlipSigmas, up to the highest level."""
        return self.sample(latents, texts, cfg, self.call("FlipSigmas", sigmas=self.sigmas)[0])

    def rf(
        self, latents: Tensor, source: list[str], target: list[str], cfg: float, gamma=0.5, eta=0.9, until=0.25
    ) -> Tensor:
        """RF inversion: a flow up that is drawn to noise, and one down that is drawn to the picture at its start."""
        picture = self.model.model.process_latent_in(latents)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
        rising = self.call("FlipSigmas", sigmas=self.sigmas)[0]
        up = controlled(lambda x, s: (noise - x) / (1 - s).clamp(min=1e-3), lambda i: gamma)
        down = controlled(lambda x, s: (x - picture) / s, lambda i: eta if i < until * self.steps else 0.0)
        # The host's scaling at both ends is undone: x of a flow at its level 0 is the picture, at 1 the noise.
        state: dict[str, Tensor] = {}
        self.sample(latents, source, 1.0, rising, kept(up, state, picture))
        return self.sample(latents, target, cfg, self.sigmas, kept(down, {}, state["end"]))

    def pictures(self, latents: Tensor) -> Tensor:
        return self.lab.pictures(self.name, latents)

    def source(self, plain: bool) -> list[str]:
        return [prompt(o, ANY if plain else b) for o, b in zip(self.real.objects, self.real.backgrounds, strict=True)]

    def targets(self) -> list[int]:
        """Another object for each picture."""
        return [(o + 61) % len(OBJECTS) for o in self.real.objects]

    def target(self, plain: bool) -> list[str]:
        return [prompt(o, ANY if plain else b) for o, b in zip(self.targets(), self.real.backgrounds, strict=True)]


def controlled(aim: Callable[[Tensor, Tensor], Tensor], weight: Callable[[int], float]):
    """Euler's method on a velocity that is drawn to another."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            level = sigmas[i].clamp(min=1e-4)
            v = (x - model(x, level * x.new_ones(len(x)), **extra_args)) / level
            v = v + weight(i) * (aim(x, level) - v)
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        return x

    return sample


def kept(sample: Callable, state: dict, begin: Tensor):
    """A SAMPLER of a function that begins at a state of its own, and keeps the one where it ends."""
    import comfy.samplers

    def run(model, x, sigmas, **more):
        state["end"] = sample(model, begin.to(x), sigmas, **more)
        return x  # at a flow's level 1 the host would divide by no signal

    def go(model, x, sigmas, **more):
        run(model, x, sigmas, **more)
        return state["end"] if sigmas[-1] < 1 else x

    return comfy.samplers.KSAMPLER(go)


def in_parts(work: Callable[[slice], Tensor], count: int) -> Tensor:
    return torch.cat([work(slice(start, start + BATCH)) for start in range(0, count, BATCH)])
