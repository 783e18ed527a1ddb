"""How much nearer to full precision do a few full weights, and a few more bits of the others, bring an fp8 model?

python dev.py bench precision [--models unet flow] [--tasks 8] [--steps 8]

The demo models are loaded by the host in its two naive fp8 formats, every weight rounded, and sampled
through the host; Attune Precision Guard puts the sensitive weights of the full file back, and bits of the others. PSNR
(pixels) is to the model as the full file gives it, from the same noise, with the standard error over groups of seeds.
Beside it what is added to the fp8 network's memory, and to the processor time of a run. Where the loss comes from is
seen by leaving one part alone rounded. Then what parts computed from unpacked weights give without the full file: as
the host computes, and where products are in 8 bits, too (each layer's input rounded; no fast fp8 runs on a processor).
Writes docs/results/precision.json and docs/results.md.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import _pack  # noqa: F401
from comfy_process import ROOT, Host
from harness import CACHE, WEIGHTS, Cell, Lab, Task, tasks
from metrics import jackknife, psnr
from pack.kernels.precision import OTHER, OUTERMOST, PROJECTION, SENSITIVE, TIME
from results import DOCS, Table, markdown, record

FORMATS = ("fp8_e4m3fn", "fp8_e5m2")
NONE, FEW, MORE = "none", "sensitive", "sensitive and outermost blocks"
GUARDS = [(NONE, 0), (FEW, 0), (MORE, 0), (FEW, 1), (FEW, 2)]  # parts in full, bits more of the others
CFG, SOLVER, SCHEDULER = 3.0, "euler", "normal"


def loaded(name: str, dtype: str):
    """The demo model with every weight in an 8-bit type, as UNETLoader's weight_dtype has it."""
    import comfy.sd

    options = {"dtype": getattr(torch, dtype.replace("fp8", "float8"))}
    path = str(ROOT / "models/weights" / WEIGHTS[name])
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False, model_options=options)[0]


def file_of(name: str) -> str:
    return f"checkpoints/{WEIGHTS[name]}"


def guarded(host: Host, name: str, model, parts: str, bits: int = 0) -> tuple[object, str]:
    return host.call(
        "AttunePrecisionGuard", model=model, full_precision=file_of(name), parts=parts, more_bits=bits
    )  # fmt: skip


def drawn(lab: Lab, name: str, model, steps: int, work: list[Task]) -> Tensor:
    """Pictures [n 3 h w] of a model."""
    lab.models[name] = model
    cell = Cell(name, SOLVER, lab.sigmas(name, SCHEDULER, steps), CFG)
    return lab.pictures(name, lab._draw(cell, work).latents)


KINDS = (("attention", r"attn|\.qkv|\.proj\."), ("feed-forward layers", r"\.ff\.|\.mlp\."))  # of matrices, by name


def part_of(one) -> str:
    """The part of a network that a weight is counted to; matrices by what they do."""
    if one.part not in (OTHER, OUTERMOST):
        return one.part
    return next((kind for kind, pattern in KINDS if re.search(pattern, one.name)), "convolutions and the rest")


def one_part_rounded(host: Host, lab: Lab, name: str, draw: Callable, full: Tensor) -> Table:
    """PSNR to the full model with one part alone rounded, and its share of the sum of all parts' squared errors."""
    module, model = host.module("nodes._host.precision"), loaded(name, FORMATS[0])
    low = [one for one in module.weights_of(model) if one.low]
    exact = module.read_full(file_of(name), low)
    found = {}
    for part in dict.fromkeys(map(part_of, low)):
        found[part] = psnr(draw(module.with_full(model, [one for one in low if part_of(one) != part], exact)), full)
    energy = {part: float((10 ** (-each / 10)).mean()) for part, each in found.items()}
    rows: list = [
        [part, sum(one.value.numel() for one in low if part_of(one) == part) / 1e6, f"{float(found[part].mean()):.2f}",
         100 * energy[part] / sum(energy.values())]
        for part in sorted(energy, key=lambda part: -energy[part])
    ]  # fmt: skip
    same = torch.equal(draw(module.with_full(model, low, exact)), full)
    rows.append(["none", None, "the full model's, bit for bit" if same else "another one", None])
    columns = ["part that stays rounded", "million weights", "PSNR dB", "share of the squared error, %"]
    return Table(f"{name}: where the loss of {FORMATS[0]} comes from", columns, rows)


def in_8_bits(layer, args: tuple) -> tuple | None:
    """A layer's input as fp8_e4m3fn_fast has it where the weight is in that type."""
    kind = torch.float8_e4m3fn
    return (args[0].clamp(-448, 448).to(kind).to(args[0].dtype), *args[1:]) if layer.weight.dtype == kind else None


def without_the_file(host: Host, lab: Lab, name: str, draw: Callable, full: Tensor) -> Table:
    """PSNR to the full model where some parts are computed from unpacked weights: is a cache of them worth it?"""
    module, model, rows = host.module("nodes._host.precision"), loaded(name, FORMATS[0]), []
    low = [one for one in module.weights_of(model) if one.low]
    parts = {NONE: (), "time embedding": (TIME,), "and its projections": (TIME, PROJECTION), "all sensitive": SENSITIVE}
    hooks: list = []
    for label in ("wider", "in 8 bits"):
        found = []
        for chosen in parts.values():
            some = [one for one in low if one.part in chosen]
            unpacked = module.with_full(model, some, {one.name: one.unpacked for one in some})
            each = psnr(draw(unpacked), full)
            found.append(f"{float(each.mean()):.2f}")
        rows.append([label, *found])
        linear = [one for one in model.model.diffusion_model.modules() if isinstance(one, torch.nn.Linear)]
        hooks += [one.register_forward_pre_hook(in_8_bits) for one in linear]
    for hook in hooks:
        hook.remove()
    columns = ["products", *(f"unpacked: {part}" if part == NONE else part for part in parts)]
    return Table(f"{name}: {FORMATS[0]} without the full file, PSNR dB", columns, rows)


def megabytes(model) -> float:
    """Of a network's weights as loaded."""
    return sum(one.numel() * one.element_size() for one in model.model.diffusion_model.parameters()) / 1e6


def added(model) -> float:
    """Megabytes of what a guard adds to a model."""
    held = [one.numel() * one.element_size() for one in model.object_patches.values() if isinstance(one, Tensor)]
    return (sum(held) + sum(one.more.size for (one,) in model.weight_wrapper_patches.values())) / 1e6


def measure(host: Host, lab: Lab, names: list[str], steps: int, work: list[Task], say: Callable) -> list[Table]:
    tables = []
    for name in names:
        draw = lambda model, name=name: drawn(lab, name, model, steps, work)
        full, rows = draw(lab.models[name]), []
        for dtype in FORMATS:
            model, first, plain = loaded(name, dtype), 0.0, 0.0
            draw(model)
            size = megabytes(model)
            for parts, bits in GUARDS:
                used = model if parts == NONE else guarded(host, name, model, parts, bits)[0]
                began = time.process_time()
                each = psnr(draw(used), full)
                seconds = time.process_time() - began
                mean, error = jackknife(lambda rows, each=each: float(each[rows].mean()), len(each), min(6, len(each)))
                first, plain = (mean, seconds) if parts == NONE else (first, plain)
                rows.append(
                    [dtype, parts, bits, f"{mean:.2f} ± {error:.2f}", f"{mean - first:+.2f}", size, added(used),
                     f"{seconds / plain:.2f}"]
                )  # fmt: skip
                say(f"{name}, {dtype}, {parts}, {bits} bits: {mean:.2f} dB, {mean - first:+.2f}")
        columns = [
            "format", "full weights", "more bits of the others", "PSNR dB", "gain dB", "network MB", "added MB",
            "processor time",
        ]  # fmt: skip
        tables.append(Table(f"{name}: fp8 beside the full model", columns, rows))
        tables.append(one_part_rounded(host, lab, name, draw, full))
        tables.append(without_the_file(host, lab, name, draw, full))
    return tables


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
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
