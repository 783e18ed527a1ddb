"""How many pictures does a ranking by Fréchet distance need? Schedules of five steps, drawn for hundreds of prompts.

python dev.py bench samples [--models unet flow] [--sampler dpmpp_2m] [--steps 5] [--tasks 192]

All schedules of `schedules`, with many pictures each (the shipped training data allows 384). The ranking by all of them
is compared with the ranking by fewer, drawn at random; the same prompts and noises stand behind every schedule. Results
are cached. Writes docs/results/samples.json and docs/results.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_process import Host
from harness import BATCH, CACHE, Cell, Lab, Task, tasks
from judge import load_judge
from looks import GROUPS, to_data
from metrics import frechet, jackknife, kernel_distance, rank_stability
from results import DOCS, Table, markdown, record
from schedules import CORE, names, number, progress

MEASURES = {"Fréchet": frechet, "kernel": lambda a, b: 1000 * kernel_distance(a, b)}


def features(lab: Lab, cell: Cell, work: list[Task], say) -> Tensor:
    """The judge's features [n 256] of a cell's pictures, cached beside its latents."""
    found = []
    for start in range(0, len(work), BATCH):
        part = work[start : start + BATCH]
        path = lab.path(cell, part).with_suffix(".features")
        if not path.exists():
            pictures = lab.pictures(cell.model, lab.run(cell, part).latents)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": load_judge()(pictures)[0].contiguous()}, temporary)
            temporary.replace(path)
        found.append(load_file(path)["features"])
        say(f"{start + len(part)}/{len(work)}")
    return torch.cat(found)


def counts(most: int) -> list[int]:
    """24, 48, 96, … and the most."""
    return sorted({most, *(24 * 2**i for i in range(8) if 24 * 2**i < most)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CORE), default=list(CORE))
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=192)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, work, tables = time.perf_counter(), tasks(args.tasks), []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Host(Path(folder)), args.cache)
        for model in args.models:
            seen = {
                name: features(
                    lab,
                    Cell(model, args.sampler, lab.sigmas(model, name, args.steps)),
                    work,
                    progress(f"{model} {name}"),
                )
                for name in names(model, args.sampler, args.steps)
                if name != "auto"  # the same levels as core AYS
            }
            tables += [ranking(model, seen, args.tasks), stability(model, seen, args.tasks)]
    notes = [
        f"{args.sampler}, {args.steps} steps, {args.tasks} pictures per schedule; cfg 3; {GROUPS} disjoint groups."
    ]
    record("samples", "How many pictures a ranking by distance needs", tables, began, [], notes, args.out)
    print("\r" + "\n".join(map(markdown, tables)))


def ranking(model: str, seen: dict[str, Tensor], count: int) -> Table:
    def distance(metric: Callable, found: Tensor) -> str:
        return number(jackknife(lambda kept: to_data(metric, found, kept), count, GROUPS))

    body = [[name, *(distance(metric, found) for metric in MEASURES.values())] for name, found in seen.items()]
    return Table(f"{model}: distance to the training data", ["schedule", *MEASURES], body, "kernel in thousandths.")


def stability(model: str, seen: dict[str, Tensor], most: int) -> Table:
    body = []
    for count in counts(most):
        line: list = [count]
        for metric in MEASURES.values():
            scores = lambda kept, m=metric: torch.tensor([to_data(m, found, kept) for found in seen.values()])
            line += [f"{value:.2f}" for value in rank_stability(scores, most, count, 50)]
        body.append(line)
    columns = ["samples", *(f"{name}: {what}" for name in MEASURES for what in ("Kendall τ", "same winner"))]
    note = (
        f"Drawn with replacement from the {most} of each schedule, 50 times; agreement with the ranking by all of them."
    )
    return Table(f"{model}: how many pictures make the ranking stable?", columns, body, note)


if __name__ == "__main__":
    main()
