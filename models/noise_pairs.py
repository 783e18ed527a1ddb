"""Pairs of noise and golden noise on disk: safetensors shards, whole or absent, so that work can stop and go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .store import is_finite, load_tensors, save_tensors, shortened
from .training import UNFINISHED, differences

LARGEST_SHARD = 4 << 30  # bytes
FORMAT = "1"
FEWEST_PROMPTS = 20  # prompts: a tenth of them is kept from training


@dataclass(frozen=True)
class Job:
    """One pair to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Shard:
    """n pairs: noise and golden [n c h w]; which [n]: the row of their prompt in tokens [p t d] and pooled [p d].

    jobs say what was drawn, facts with which model and guidance.
    """

    noise: Tensor
    golden: Tensor
    which: Tensor
    tokens: Tensor
    pooled: Tensor | None
    jobs: tuple[Job, ...]
    facts: Mapping[str, Any]


def plan(prompts: list[str], seeds_per_prompt: int, first_seed: int, size: int) -> list[list[Job]]:
    """All jobs in shards of `size`; every pair has a seed of its own, the same whichever machine makes it."""
    jobs = [
        Job(prompt, (first_seed + i * seeds_per_prompt + j) % 2**64)
        for i, prompt in enumerate(prompts)
        for j in range(seeds_per_prompt)
    ]
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def part_of(shards: int, part: str) -> list[int]:
    """The shards of a part "2/4": the second machine of four; ValueError for anything else."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"'part' must be such as 1/1, or 2/4 for the second of four machines, but it is {part!r}.")
    return list(range(int(number) - 1, shards, int(parts)))


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"pairs-{index:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """The finished shards in order; ValueError when there is none."""
    found = sorted(folder.glob("pairs-*.safetensors")) if folder.is_dir() else []
    if not found:
        raise ValueError(
            f"There are no noise pairs in {folder}. Connect 'model', 'clip', 'negative' and 'latent_image' to collect "
            "some."
        )
    return found


def save_shard(path: Path, shard: Shard) -> None:
    """Latents and embeddings as float16, what they are as metadata."""
    tensors = {"noise": shard.noise.half(), "golden": shard.golden.half(), "which": shard.which.int()}
    tensors["tokens"] = shard.tokens.half()
    if shard.pooled is not None:
        tensors["pooled"] = shard.pooled.half()
    metadata = {
        "pairs_format": FORMAT, "facts": json.dumps(dict(shard.facts), sort_keys=True),
        "jobs": json.dumps([[job.prompt, job.seed] for job in shard.jobs]),
    }  # fmt: skip
    save_tensors(path, tensors, metadata)


def load_shard(path: Path) -> Shard:
    """A shard, float32; ValueError names the file and what is wrong with it."""
    jobs, facts = read_jobs(path)
    try:
        tensors, _ = load_tensors(path)
    except ValueError as error:
        raise _no_pairs(path, error) from error
    _check(path.name, tensors, len(jobs))
    noise, golden, tokens = (tensors[name].float() for name in ("noise", "golden", "tokens"))
    pooled = tensors["pooled"].float() if "pooled" in tensors else None
    return Shard(noise, golden, tensors["which"].long(), tokens, pooled, jobs, facts)


def read_jobs(path: Path) -> tuple[tuple[Job, ...], Mapping[str, Any]]:
    """What was drawn and with what, from the file's header alone; ValueError as `load_shard`."""
    if path.stat().st_size > LARGEST_SHARD:
        raise ValueError(
            f"{path.name} is larger than {LARGEST_SHARD:,} bytes. Delete it, lower 'shard_size' and collect again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        jobs = tuple(Job(str(prompt), int(seed)) for prompt, seed in json.loads(facts["jobs"]))
        return jobs, dict(json.loads(facts["facts"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _no_pairs(path, error) from error


def _no_pairs(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path.name} holds no noise pairs ({shortened(error)}). Delete it and collect again.")


def _check(name: str, tensors: dict[str, Tensor], n: int) -> None:
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    fits = (
        {"noise", "golden", "which", "tokens"} <= set(shapes)
        and len(shapes["noise"]) == 4
        and shapes["noise"] == shapes["golden"]
        and shapes["which"] == (n,) == shapes["noise"][:1]
        and len(shapes["tokens"]) == 3
        and all(all(shape) for shape in shapes.values())
        and not tensors["which"].is_floating_point()
        and 0 <= int(tensors["which"].min()) <= int(tensors["which"].max()) < shapes["tokens"][0]
        and ("pooled" not in shapes or (len(shapes["pooled"]) == 2 and shapes["pooled"][0] == shapes["tokens"][0]))
        and all(is_finite(value) for key, value in tensors.items() if key != "which")
    )
    if not fits:
        raise ValueError(
            f"{name} holds no noise pairs: its tensors are {shortened(shapes, 500)}. Delete it and collect again."
        )


def remaining(folder: Path, shards: list[list[Job]], part: str, facts: Mapping[str, Any]) -> list[int]:
    """The shards of a part that are not there yet; ValueError if the folder holds pairs of other settings."""
    missing = []
    for index in part_of(len(shards), part):
        path = shard_path(folder, index)
        if path.exists():
            check_same(path, *read_jobs(path), shards[index], facts)
        else:
            missing.append(index)
    return missing


def check_same(
    path: Path, jobs: tuple[Job, ...], facts: Mapping[str, Any], wanted: list[Job], settings: Mapping[str, Any]
) -> None:  # fmt: skip
    """ValueError unless a file's pairs are, or for an unfinished one begin as, the wanted ones."""
    other = differences(facts, settings)
    if not other and (list(jobs) != wanted[: len(jobs)] or (path.suffix != UNFINISHED and len(jobs) != len(wanted))):
        other = "other prompts, seeds or shard_size"
    if other:
        raise ValueError(
            f"{path} was made with other prompts or settings: {other}. Set that back, choose another 'pairs' or "
            "'name', or delete that folder."
        )


def held_out(prompts: Collection[str]) -> frozenset[str]:
    """The tenth of the prompts that is kept from training, whatever their seeds: no prompt is in both parts.

    ValueError for too few of them.
    """
    if len(set(prompts)) < FEWEST_PROMPTS:
        raise ValueError(
            f"There are {len(set(prompts))} different prompts, too few to keep a tenth of them from training: give "
            f"{FEWEST_PROMPTS} or more."
        )
    number = {
        prompt: int(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(), 16) for prompt in prompts
    }
    return frozenset(prompt for prompt in number if number[prompt] % 10 == 0) or frozenset(
        [min(number, key=number.__getitem__)]
    )


def rows(shard: Shard, held: Collection[str], validation: bool) -> Tensor:
    """The row numbers of a shard's pairs in one of the two parts."""
    kept = [i for i, job in enumerate(shard.jobs) if (job.prompt in held) == validation]
    return torch.tensor(kept, dtype=torch.long)
