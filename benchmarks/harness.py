"""Sample many prompts with many settings through the real host, once: every result is cached by what it depends on.

A `Cell` names a model, a sampler and its noise levels. `Lab.run(cell, tasks)` returns the final latents of its tasks,
batch by batch through the host's own SamplerCustomAdvanced, and keeps them in `.host/bench/` under a hash of everything
that could change them. An interrupted benchmark continues where it stopped, and an expensive reference is computed once
for all benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from comfy_process import ROOT, Host
from judge import BACKGROUNDS, OBJECTS

CACHE = ROOT / ".host" / "bench"
WEIGHTS = {"unet": "attune_demo.safetensors", "flow": "attune_demo_flow.safetensors"}
BATCH = 16
FORMAT = 1  # raise it when the way of sampling below changes


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def prompt(obj: int, background: int) -> str:
    """The plainest wording for an object and a background of the vocabulary, by index."""
    o, b = OBJECTS[obj], list(BACKGROUNDS)[background]
    return f"{article(o)} {o} on {article(b)} {b} background"


@dataclass(frozen=True)
class Task:
    """One picture to draw: what, on what, from which noise."""

    obj: int
    background: int
    seed: int


def tasks(count: int, first_seed: int = 0) -> list[Task]:
    """Objects and backgrounds in turn, with strides that visit every pair; one seed each."""
    n, m = len(OBJECTS), len(BACKGROUNDS)
    return [Task(37 * i % n, (7 * i + i // n) % m, first_seed + i) for i in range(count)]


@dataclass(frozen=True)
class Cell:
    """One setting: which demo model, which sampler, which noise levels."""

    model: str  # "unet" or "flow"
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float = 3.0


@dataclass
class Drawn:
    """Final latents [n c h w] of a cell, with what they cost."""

    latents: Tensor
    calls: int  # evaluations of the guided model per batch
    seconds: float  # of sampling, all batches


class _Noise:
    """A NOISE with one seed per item of the batch: item i equals RandomNoise(seed i) alone."""

    def __init__(self, seeds: list[int]):
        self.seeds, self.seed = seeds, seeds[0]

    def generate_noise(self, latent: dict) -> Tensor:
        shape = latent["samples"].shape[1:]
        return torch.cat([torch.randn(1, *shape, generator=torch.manual_seed(seed)) for seed in self.seeds])


class Lab:
    """The host, the demo models and the cache."""

    def __init__(self, host: Host, cache: Path = CACHE):
        self.host, self.cache = host, cache
        self.cache.mkdir(parents=True, exist_ok=True)
        self.models, self.vaes, self.digests = {}, {}, {}
        for name, file in WEIGHTS.items():
            self.models[name], clip, self.vaes[name] = host.call("CheckpointLoaderSimple", ckpt_name=file)
            self.clip = clip or self.clip
            self.digests[name] = hashlib.sha256((ROOT / "models" / "weights" / file).read_bytes()).hexdigest()

    def conditioning(self, texts: list[str]) -> list:
        """One CONDITIONING whose batch holds the encoded prompts, [n tokens width]."""
        encoded = [self.host.call("CLIPTextEncode", clip=self.clip, text=text)[0][0] for text in texts]
        pooled = [extra["pooled_output"] for _, extra in encoded]
        return [[torch.cat([context for context, _ in encoded]), {"pooled_output": torch.cat(pooled)}]]

    def run(self, cell: Cell, work: list[Task], say: Callable[[str], None] = lambda _: None) -> Drawn:
        """The cell's latents for all tasks, from the cache where it has them."""
        path = self.path(cell, work)
        if not path.exists():
            self._draw(cell, work, path, say)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            return Drawn(file.get_tensor("latents"), int(facts["calls"]), float(facts["seconds"]))

    def path(self, cell: Cell, work: list[Task]) -> Path:
        """The cache file of a cell: its name is a hash of everything that could change the result."""
        import comfyui_version

        versions = [comfyui_version.__version__, torch.__version__, FORMAT]
        drawn = [[t.obj, t.background, t.seed] for t in work]
        facts = [cell.sampler, cell.sigmas, cell.cfg, self.digests[cell.model], drawn, BATCH, versions]
        return self.cache / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"

    def _draw(self, cell: Cell, work: list[Task], path: Path, say: Callable[[str], None]) -> None:
        call, model = self.host.call, self.models[cell.model]
        channels = model.get_model_object("latent_format").latent_channels
        (solver,) = call("KSamplerSelect", sampler_name=cell.sampler)
        latents, seconds, calls = [], 0.0, 0
        for start in range(0, len(work), BATCH):
            part = work[start : start + BATCH]
            positive = self.conditioning([prompt(t.obj, t.background) for t in part])
            counted = counting(model)
            (guider,) = call(
                "CFGGuider",
                model=counted.model,
                positive=positive,
                negative=self.conditioning([""] * len(part)),
                cfg=cell.cfg,
            )
            began = time.perf_counter()
            out, _ = call(
                "SamplerCustomAdvanced", noise=_Noise([t.seed for t in part]), guider=guider, sampler=solver,
                sigmas=torch.tensor(cell.sigmas), latent_image={"samples": torch.zeros(len(part), channels, 16, 16)},
            )  # fmt: skip
            seconds += time.perf_counter() - began
            calls = counted.calls
            latents.append(out["samples"])
            say(f"{start + len(part)}/{len(work)}")
        temporary = path.with_suffix(".tmp")
        save_file({"latents": torch.cat(latents)}, temporary, metadata={"calls": str(calls), "seconds": str(seconds)})
        temporary.replace(path)

    def pictures(self, model: str, latents: Tensor) -> Tensor:
        """[n 3 128 128] in 0..1, through the stock VAEDecode."""
        parts = [
            self.host.call("VAEDecode", samples={"samples": z}, vae=self.vaes[model])[0] for z in latents.split(BATCH)
        ]
        return torch.cat(parts).permute(0, 3, 1, 2)

    def sigmas(self, model: str, name: str, steps: int) -> tuple[float, ...]:
        """Noise levels by the name of a stock scheduler, of a core node ("core AYS") or of one of our schedules."""
        import comfy.samplers

        if name in comfy.samplers.SCHEDULER_NAMES:
            inputs = {"scheduler": name, "model": self.models[model], "steps": steps, "denoise": 1.0}
            (sigmas,) = self.host.call("BasicScheduler", **inputs)
        elif name == "core AYS":
            (sigmas,) = self.host.call("AlignYourStepsScheduler", model_type="SD1", steps=steps, denoise=1.0)
        else:
            inputs = {"schedule": name, "model": self.models[model], "steps": steps, "denoise": 1.0}
            (sigmas,) = self.host.call("AttuneScheduler", **inputs)
        return tuple(sigmas.tolist())


@dataclass
class _Counted:
    model: object
    calls: int = 0


def counting(model) -> _Counted:
    """A clone of a MODEL that counts its guided evaluations."""
    import comfy.patcher_extension

    counted = _Counted(model.clone())

    def wrap(executor, *args, **kwargs):
        counted.calls += 1
        return executor(*args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    counted.model.add_wrapper_with_key(kind, "attune.bench.count", wrap)
    return counted
