"""Read the pairs that the authors of NPNet published, and write them as shards that the trainer reads.

A module of the pack as ComfyUI loaded it, for `train_npnet.py`.
"""

from __future__ import annotations

import itertools
import json
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.noise_pairs import Job, Shard, check_same, read_jobs, save_shard, shard_path
from ..models.store import shortened
from ..models.training import check_writable

LARGEST_PAIR = 64 << 20  # bytes; a published one has 262,000
BAD_PAIR = (  # what reading a damaged archive of arrays can end in
    OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError, SyntaxError, tokenize.TokenError,
)  # fmt: skip


def import_published(clip: Any, source: Path, folder: Path, shard_size: int) -> int:
    """Write the pairs of a folder in the authors' format as shards, with their prompts' embeddings; their number.

    Shards of these very pairs that are there already are kept, so that an interrupted import goes on; ValueError for
    others, and for prompts of several lengths.
    """
    from ..nodes._host.noise_pairs import encode, stack  # the host; reading alone needs none

    check_writable(folder)
    pairs, index, count, facts = published_pairs(source), 0, 0, {"source": source.name}
    while some := list(itertools.islice(pairs, shard_size)):
        path, jobs = shard_path(folder, index), [job for job, _, _ in some]
        if path.exists():
            check_same(path, *read_jobs(path), jobs, facts)
        else:
            prompts = list(dict.fromkeys(job.prompt for job in jobs))
            which = torch.tensor([prompts.index(job.prompt) for job in jobs])
            noise, golden = torch.cat([pair[1] for pair in some]), torch.cat([pair[2] for pair in some])
            texts = stack([(prompt, encode(clip, prompt)) for prompt in prompts])
            save_shard(path, Shard(noise, golden, which, *texts, tuple(jobs), facts))
        index, count = index + 1, count + len(some)
    return count


def published_pairs(folder: Path) -> Iterator[tuple[Job, Tensor, Tensor]]:
    """Prompt, noise and golden noise [1 c h w] of a folder in the authors' format: INDEX_SEED.npz and JSON lines.

    Only pairs whose picture scored higher with the golden noise, in the order of the lines. Lines without a file are
    passed over. Nothing is unpickled or evaluated; ValueError names a line or a file that is damaged.
    """
    lines = [
        (path, line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text("utf-8", "replace").splitlines()
    ]
    if not lines:
        raise ValueError(f"There are no published pairs in {folder}: expected a .jsonl file and .npz files beside it.")
    for path, line in lines:
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            index, seed = int(told["index"]), int(told["seed"])
            if not (0 <= index < 2**64 and 0 <= seed < 2**64):
                raise ValueError("index and seed are numbers of 64 bits")
            name = f"{index}_{seed}.npz"
            better = float(told["original_score_list"][0]) < float(told["optimized_score_list"][0])
            job = Job(str(told["caption"]), seed)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            said = f"({shortened(error)}): {shortened(line, 80)}"
            raise ValueError(f"{path.name} holds a line that describes no pair {said}") from error
        if better and (folder / name).exists():
            yield job, *_published(folder / name)


def _published(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > LARGEST_PAIR:
                raise ValueError(f"{size:,} bytes unpacked")
            for name in ("arr_0.npy", "arr_1.npy"):
                with archive.open(name) as file:
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype.kind != "f" or math.prod(shape) * dtype.itemsize > archive.getinfo(name).file_size:
                    raise ValueError(f"{dtype} numbers in the shape {shape}")
        with np.load(path, allow_pickle=False) as arrays:
            noise, golden = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float32)) for key in ("arr_0", "arr_1"))
        if noise.ndim != 4 or noise.shape != golden.shape or len(noise) != 1:
            raise ValueError(f"arrays of {tuple(noise.shape)} and {tuple(golden.shape)}")
        if not (noise.isfinite().all() and golden.isfinite().all()):
            raise ValueError("numbers that are not finite")
    except BAD_PAIR as error:
        raise ValueError(f"{path.name} holds no pair of noises ({shortened(error)}). Delete it or its line.") from error
    return noise, golden
