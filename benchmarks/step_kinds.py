"""What does each kind of step cost on networks of real size? Whole steps, and steps that reuse features.

python dev.py bench step_kinds [--models SD1.5 SDXL] [--pixels 512] [--dtype bf16] [--steps 9]

SD1.5 and SDXL with random weights are sampled through the host with Attune Propagation, a key step every fourth
step. FLOPs are counted operator by operator while the steps run; beside them stands what the node predicts from the
shapes. Time is relative to the whole steps of the same run, without its first step, which warms up. Working memory is
what a step takes on top of what was in use before it; kept is what the node holds between the steps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from comfy_process import ROOT, Host
from real_size import DTYPES, FAMILIES, UNCOUNTED, build, lacking, peak_memory, sample, synchronize
from results import DOCS, Table, markdown, record

REUSES = ["encoder reused", "top level fresh", "two levels fresh", "one block fresh"]
INTERVAL = 4


@dataclass
class Step:
    """One evaluation of the network."""

    whole: bool
    seconds: float
    flops: float
    working: float | None  # GB


@contextmanager
def watching(network: torch.nn.Module) -> Iterator[list[Step]]:
    """Write down every evaluation of a UNet in the block; one that runs its middle is whole."""
    steps: list[Step] = []
    open_: list[Any] = []
    whole = [False]
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:

        def enter(*_) -> None:
            whole[0] = False
            memory = peak_memory()
            synchronize()
            open_[:] = [memory, memory.__enter__(), in_use(), counter.get_total_flops(), clock()]

        def leave(*_) -> None:
            synchronize()
            memory, peak, before, flops, began = open_
            seconds = clock() - began
            memory.__exit__(None, None, None)
            working = None if peak[0] is None or before is None else peak[0] - before
            steps.append(Step(whole[0], seconds, counter.get_total_flops() - flops, working))

        def see_middle(*_) -> None:
            whole[0] = True

        handles = [
            network.register_forward_pre_hook(enter),
            network.register_forward_hook(leave),
            network.middle_block[0].register_forward_pre_hook(see_middle),
        ]
        try:
            yield steps
        finally:
            for handle in handles:
                handle.remove()


def clock() -> float:
    """On a CPU the processor's time, so that other work on the machine does not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def in_use() -> float | None:
    """Memory in use, in GB: of the GPU, or of this process (Linux; elsewhere None)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return None
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e6


def measure(host: Host, name: str, args: argparse.Namespace) -> tuple[list[list], list[dict]]:
    """Table rows of one family, and the steps behind them."""
    import comfy.model_management

    family, dtype = FAMILIES[name], DTYPES[args.dtype]
    if said := lacking(family, dtype, args.memory):
        return [[f"{name}: not measured, {said}"]], []
    model = build(family, str(comfy.model_management.get_torch_device()), dtype)
    rows, raw = [], []
    for reuse in REUSES:
        (patched,) = host.call(
            "AttunePropagation", model=model, mode="uniform", interval=INTERVAL, speed=1.5, reuse=reuse,
            forecast=False, keep_last=0, start_percent=0.0, end_percent=1.0, prior_noise=0.0,
            cache_dtype="as computed", cache_device="as computed", memory_limit=0, parallel="off",
        )  # fmt: skip
        with watching(model.model.diffusion_model) as steps:
            sample(host, patched, family, args.pixels, args.steps)
        predicted, kept = predictions(model, reuse, args.pixels // 8)
        whole, part = ([step for step in steps[1:] if step.whole == kind] for kind in (True, False))
        rows.append([name, reuse, *ratios(whole, part), predicted, kept * dtype.itemsize / 1e6])
        raw.append({"model": name, "reuse": reuse, "steps": list(map(asdict, steps))})
        print(*rows[-1], flush=True)
    del model, patched
    gc.collect()  # a network and its patcher know each other; the next one needs the memory
    return rows, raw


def predictions(model: Any, reuse: str, side: int) -> tuple[float, int]:
    """What the node says of a shorter step: percent of a whole one, and elements kept for one picture."""
    pack: Callable[[str], Any] = lambda module: sys.modules[f"{ROOT}.{module}"]
    network = model.model.diffusion_model
    size = pack("nodes._host.propagation.unet").measure_unet(network, side, side)
    levels = pack("nodes._host.propagation.unet").levels_above(network)
    part = pack("nodes._plan.propagation").reuse_by_name(reuse, False, len(size.skips), levels)
    return 100 * size.costs.of_step(part), size.kept_elements(part)


def ratios(whole: list[Step], part: list[Step]) -> list:
    """Shorter steps in percent of whole ones: FLOPs, time (median, smallest, largest); GB that both kinds take."""
    seconds = statistics.median(step.seconds for step in whole)
    times = sorted(100 * step.seconds / seconds for step in part)
    memory = [max((s.working for s in steps if s.working is not None), default=None) for steps in (whole, part)]
    return [
        100 * part[0].flops / whole[0].flops, statistics.median(times), f"{times[0]:.1f}–{times[-1]:.1f}",
        *(None if m is None else 1000 * m for m in memory),
    ]  # fmt: skip


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["SD1.5", "SDXL"], default=["SD1.5", "SDXL"])
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--steps", type=int, default=2 * INTERVAL + 1)
    parser.add_argument("--memory", type=float, default=9.0 if not torch.cuda.is_available() else 1e9, metavar="GB")
    parser.add_argument("--cache", type=Path, help="not used: nothing here is worth keeping")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    if args.steps < 8:
        parser.error("--steps must be at least 8: in shorter runs the node stands aside")
    rows, data = [], []
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        for name in args.models:
            own, raw = measure(host, name, args)
            rows += own
            data += raw
    table = Table(
        f"Shorter steps in percent of whole steps, {args.pixels} px, {args.dtype}",
        ["network", "reuse", "FLOPs %", "time %", "smallest–largest", "working MB, whole", "working MB, shorter",
         "FLOPs % predicted", "kept MB"],
        rows,
        "One picture, one condition. 'kept MB' doubles with forecast, and again with a negative prompt.",
    )  # fmt: skip
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    record("step_kinds", "What a step that reuses features costs", [table], began, (), notes, args.out, data)
    print(markdown(table))


if __name__ == "__main__":
    main()
