"""Sample many prompts with many settings through the real host, once: every result is cached by what it depends on.

A `Cell` names a model, the nodes between it and the sampler, the sampler and its noise levels. `Lab.run(cell, tasks)`
returns the final latents of its tasks, batch by batch through the host's own SamplerCustomAdvanced, and keeps every
batch in `.host/bench/` under a hash of everything that could change it. An interrupted benchmark continues where it
stopped, more samples only cost what is new, and an expensive reference is computed once for all benchmarks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
ANY = -1
LOADERS = {"profile": ("AttuneLoadProfile", "profile_name"), "npnet": ("AttuneLoadNPNet", "npnet_name")}
FORMAT = 2  # raise it when the way of sampling below changes


CORE = {  # schedules that core nodes bring beside the list of schedulers
    "core AYS": ("AlignYourStepsScheduler", {"model_type": "SD1"}),
    "core GITS": ("GITSScheduler", {"coeff": 1.2}),
    "core OptimalSteps": ("OptimalStepsScheduler", {"model_type": "FLUX"}),
}


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def prompt(obj: int, background: int) -> str:
    """The plainest wording for an object and a background of the vocabulary, by index; ANY leaves that open."""
    o = OBJECTS[obj]
    if background == ANY:
        return f"{article(o)} {o}"
    b = list(BACKGROUNDS)[background]
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
    """One setting: which demo model, which sampler, which noise levels, which MODEL -> MODEL nodes before them.

    A node is (node id, its inputs as (name, value) pairs without the MODEL): (("RescaleCFG", (("multiplier", 0.7),)),).
    An input "profile" or "npnet" is given by the name under which it can be loaded. A sampler that is no name of the
    stock list is such a pair, too.
    """

    model: str  # "unet" or "flow"
    sampler: str | tuple[str, tuple]
    sigmas: tuple[float, ...]
    cfg: float = 3.0
    nodes: tuple[tuple[str, tuple], ...] = ()
    side: int = 128  # of the pictures, in pixels


@dataclass
class Drawn:
    """Final latents [n c h w] of a cell, with what they cost."""

    latents: Tensor
    calls: int  # evaluations of the network per batch; cond and uncond together are one


class Noise:
    """A NOISE with one seed per item of the batch: item i equals RandomNoise(seed i) alone."""

    def __init__(self, seeds: list[int]):
        self.seeds, self.seed = seeds, seeds[0]

    def generate_noise(self, latent: dict) -> Tensor:
        shape = latent["samples"].shape[1:]
        return torch.cat([torch.randn(1, *shape, generator=torch.manual_seed(seed)) for seed in self.seeds])


class Lab:
    """The host, the demo models and the cache."""

    def __init__(self, host: Host, cache: Path = CACHE, converged_steps: int = 200):
        self.host, self.cache, self.converged_steps = host, cache, converged_steps
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
        latents, calls = [], 0
        for start in range(0, len(work), BATCH):
            part = work[start : start + BATCH]
            path = self.path(cell, part)
            if not path.exists():
                drawn = self._draw(cell, part)
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                save_file({"latents": drawn.latents.contiguous()}, temporary, metadata={"calls": str(drawn.calls)})
                temporary.replace(path)
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                latents.append(file.get_tensor("latents"))
            calls = int(facts["calls"])
            say(f"{start + len(part)}/{len(work)}")
        return Drawn(torch.cat(latents), calls)

    def seconds(self, cells: list[Cell], part: list[Task], rounds: int = 3) -> list[float]:
        """Seconds of sampling one batch with each cell: the least of some rounds through all of them, never cached.

        Without a GPU these are the processor's seconds, so that other work on the machine does not count.
        """
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        least = [float("inf")] * len(cells)
        for _ in range(rounds):
            for i, cell in enumerate(cells):
                began = clock()
                self._draw(cell, part)
                least[i] = min(least[i], clock() - began)
        return least

    def path(self, cell: Cell, part: list[Task]) -> Path:
        """The cache file of a batch: its name is a hash of everything that could change the result."""
        import comfyui_version

        versions = [comfyui_version.__version__, torch.__version__, FORMAT]
        drawn = [[t.obj, t.background, t.seed] for t in part]
        facts = [cell.sampler, cell.sigmas, cell.cfg, self.digests[cell.model], drawn, versions]
        if cell.side != 128:
            facts.append(cell.side)
        if cell.nodes:
            facts.append(cell.nodes)
        names = [node for node, _ in cell.nodes]
        names += [] if isinstance(cell.sampler, str) else [cell.sampler[0]]
        if any(names):
            facts.append(code_digest() if any(name.startswith("Attune") for name in names) else "")
        return self.cache / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"

    def patched(self, model: str, nodes: tuple[tuple[str, tuple], ...], part: Sequence[Task] = ()):
        """A demo MODEL after some MODEL -> MODEL nodes, for the tasks of a batch."""
        patched = self.models[model]
        for node, inputs in nodes:
            given = {name: self.given(name, value, part) for name, value in inputs}
            patched = self.host.call(node, model=patched, **given)[0]
        return patched

    def given(self, name: str, value, part: Sequence[Task]):
        """What a node gets for an input: files are named in the cell; a benchmark may name other things, too."""
        if name in LOADERS and isinstance(value, str):
            node, key = LOADERS[name]
            return self.host.call(node, **{key: value})[0]
        return value

    def _draw(self, cell: Cell, part: list[Task]) -> Drawn:
        call, model = self.host.call, self.patched(cell.model, cell.nodes, part)
        channels = model.get_model_object("latent_format").latent_channels
        if isinstance(cell.sampler, str):
            (solver,) = call("KSamplerSelect", sampler_name=cell.sampler)
        else:
            given = {name: self.given(name, value, part) for name, value in cell.sampler[1]}
            _, solver, *_ = call(cell.sampler[0], model=model, **given)
        (guider,) = call(
            "CFGGuider",
            model=model,
            positive=self.conditioning([prompt(t.obj, t.background) for t in part]),
            negative=self.conditioning([""] * len(part)),
            cfg=cell.cfg,
        )
        latent = {"samples": torch.zeros(len(part), channels, cell.side // 8, cell.side // 8)}
        noise, sigmas = Noise([t.seed for t in part]), torch.tensor(cell.sigmas)
        given = {"noise": noise, "guider": guider, "sampler": solver, "sigmas": sigmas, "latent_image": latent}
        with counting(model) as calls:
            out, _ = call("SamplerCustomAdvanced", **given)
        return Drawn(out["samples"], calls[0])

    def pictures(self, model: str, latents: Tensor) -> Tensor:
        """[n 3 side side] in 0..1, through the stock VAEDecode."""
        parts = [self.host.call("VAEDecode", samples={"samples": z}, vae=self.vaes[model])[0] for z in latents.split(4)]
        return torch.cat(parts).permute(0, 3, 1, 2)

    def sigmas(self, model: str, name: str, steps: int) -> tuple[float, ...]:
        """Noise levels by the name of a stock scheduler, of a core node ("core AYS") or of one of our schedules."""
        import comfy.samplers

        if name in comfy.samplers.SCHEDULER_NAMES:
            inputs = {"scheduler": name, "model": self.models[model], "steps": steps, "denoise": 1.0}
            (sigmas,) = self.host.call("BasicScheduler", **inputs)
        elif name in CORE:
            node, inputs = CORE[name]
            (sigmas,) = self.host.call(node, steps=steps, denoise=1.0, **inputs)
        else:
            inputs = {"schedule": name, "model": self.models[model], "steps": steps, "denoise": 1.0}
            (sigmas,) = self.host.call("AttuneScheduler", **inputs)
        return tuple(sigmas.tolist())


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Changes with every line of the pack that a node of ours could run."""
    files = sorted(path for layer in ("kernels", "models", "nodes") for path in (ROOT / layer).rglob("*.py"))
    files += sorted((ROOT / "models" / "golden_noise").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@contextlib.contextmanager
def counting(model) -> Iterator[list[int]]:
    """Count the evaluations of a MODEL's network, at its first layer: one that a cache skips does not count."""
    network, count = model.model.diffusion_model, [0]
    first = network.input_blocks[0][0] if hasattr(network, "input_blocks") else network.x_embedder

    def see(*_) -> None:
        count[0] += 1

    handle = first.register_forward_pre_hook(see)
    try:
        yield count
    finally:
        handle.remove()


def last(generator):
    """What a generator returns in the end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
