"""How much nearer to full precision do a few full weights bring an fp8 model?

python dev.py bench precision [--models unet flow] [--tasks 8] [--steps 10]

The demo models are loaded by the host in its two naive fp8 formats, every weight rounded, and sampled
through the host; Attune Precision Guard puts the sensitive weights of the full file back. PSNR (pixels) is to the model
as the full file gives it, from the same noise, with the standard error over groups of seeds. Beside it what the full
weights add to the fp8 network's memory. Writes docs/results/precision.json and
docs/results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from comfy_process import ROOT, Host
from harness import CACHE, WEIGHTS, Cell, Lab, Task, tasks
from metrics import jackknife, psnr
from results import DOCS, Table, markdown, record

FORMATS = ("fp8_e4m3fn", "fp8_e5m2")
NONE, FEW, MORE = "none", "sensitive", "sensitive and outermost blocks"
CFG, SOLVER, SCHEDULER = 3.0, "euler", "normal"


def loaded(name: str, dtype: str):
    """The demo model with every weight in an 8-bit type, as UNETLoader's weight_dtype has it."""
    import comfy.sd

    options = {"dtype": getattr(torch, dtype.replace("fp8", "float8"))}
    path = str(ROOT / "models/weights" / WEIGHTS[name])
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False, model_options=options)[0]


def guarded(host: Host, name: str, model, parts: str) -> tuple[object, str]:
    file = f"checkpoints/{WEIGHTS[name]}"
    return host.call("AttunePrecisionGuard", model=model, full_precision=file, parts=parts)


def drawn(lab: Lab, name: str, model, steps: int, work: list[Task]) -> Tensor:
    """Pictures [n 3 h w] of a model."""
    lab.models[name] = model
    cell = Cell(name, SOLVER, lab.sigmas(name, SCHEDULER, steps), CFG)
    return lab.pictures(name, lab._draw(cell, work).latents)


def megabytes(model, object_patches: bool) -> float:
    """Of the network's weights as loaded, or of those put in their place."""
    held = model.object_patches.values() if object_patches else model.model.diffusion_model.parameters()
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, Tensor)) / 1e6


def measure(host: Host, lab: Lab, names: list[str], steps: int, work: list[Task], say: Callable) -> list[Table]:
    tables = []
    for name in names:
        full = drawn(lab, name, lab.models[name], steps, work)
        rows = []
        for dtype in FORMATS:
            model, first = loaded(name, dtype), 0.0
            for parts in (NONE, FEW, MORE):
                used = model if parts == NONE else guarded(host, name, model, parts)[0]
                pictures = drawn(lab, name, used, steps, work)
                each = psnr(pictures, full)
                mean, error = jackknife(lambda rows, each=each: float(each[rows].mean()), len(each), min(6, len(each)))
                first = mean if parts == NONE else first
                rows.append(
                    [dtype, parts, f"{mean:.2f} ± {error:.2f}", f"{mean - first:+.2f}", megabytes(model, False),
                     megabytes(used, True)]
                )  # fmt: skip
                say(f"{name}, {dtype}, {parts}: {mean:.2f} dB, {mean - first:+.2f}")
        columns = ["format", "full weights", "PSNR dB", "gain dB", "network MB", "full weights MB"]
        tables.append(Table(f"{name}: fp8 beside the full model", columns, rows))
    return tables


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=CACHE, help="not used: nothing is kept")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        lab = Lab(host, args.cache)
        say = lambda text: print(text, flush=True)
        tables = measure(host, lab, args.models, args.steps, tasks(args.tasks), say)
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [f"{args.tasks} pictures, {args.steps} steps of {SOLVER} over '{SCHEDULER}', cfg {CFG:g}."]
    record("precision", "Full weights in fp8 models", tables, began, (), notes, args.out)


if __name__ == "__main__":
    main()
