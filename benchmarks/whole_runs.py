"""How much faster is a whole run on a network of real size? Ours, DeepCache's way of reusing, and core's caches.

python dev.py bench whole_runs [--models SD1.5 SDXL] [--pixels 256] [--dtype bf16] [--steps 50 25 20] [--add]

SD1.5 and SDXL with random weights are sampled through the host with Euler, one condition, from the first noise to the
last step. Time is that of the whole sampler call in units of the run's own whole evaluations (their median), which
cancels what a busy machine does from one run to the next; on a CPU it is the processor's. Core's caches decide by what
the network answers, and a random one answers nothing of use: for their fidelity, and for how often they skip on a
trained one, see `propagation`. Here they show what a run costs with the evaluations that are left.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from propagation import ONE, TOP, settings
from step_kinds import Step, clock, watching

from comfy_process import Host
from real_size import DTYPES, FAMILIES, build, lacking, sample, synchronize
from results import DOCS, Table, markdown, record

SHOWN = (
    "EasyCache 0.1", "LazyCache 0.1", "DeepCache", f"{TOP}, every 2", f"{ONE}, every 3", f"{ONE}, every 5",
)  # fmt: skip


def patched(host: Host, model: Any, nodes: tuple) -> Any:
    for name, inputs in nodes:
        (model,) = host.call(name, model=model, **dict(inputs))
    return model


def run(host: Host, model: Any, nodes: tuple, family: Any, pixels: int, steps: int) -> tuple[float, list[Step]]:
    """Seconds of one run, and its evaluations of the network."""
    with watching(model.model.diffusion_model) as evaluations:
        synchronize()
        began = clock()
        sample(host, patched(host, model, nodes), family, pixels, steps)
        synchronize()
        return clock() - began, evaluations


def measure(host: Host, name: str, args: argparse.Namespace) -> list[list]:
    """Table rows of one family."""
    import comfy.model_management

    family, dtype = FAMILIES[name], DTYPES[args.dtype]
    if said := lacking(family, dtype, args.memory):
        return [[f"{name}: not measured, {said}"]]
    model = build(family, str(comfy.model_management.get_torch_device()), dtype)
    run(host, model, (), family, args.pixels, 2)  # the first run in a process is slower
    rows: list[list] = []
    for steps in args.steps:
        plain: tuple[float, float] | None = None
        for label, setting in settings("unet", steps).items():
            if label != "plain" and not label.startswith(tuple(args.only)):
                continue
            seconds, evaluations = run(host, model, setting.nodes, family, args.pixels, setting.steps)
            whole = [one.seconds for one in evaluations if one.whole]
            flops, units = sum(one.flops for one in evaluations), seconds / statistics.median(whole)
            plain = plain or (flops, units)
            outside = 100 * (1 - sum(one.seconds for one in evaluations) / seconds)
            shorter = len(evaluations) - len(whole)
            rows.append([name, steps, label, len(whole), shorter, plain[0] / flops, plain[1] / units, outside])
            print(*rows[-1], flush=True)
    del model
    gc.collect()  # a network and its patcher know each other; the next one needs the memory
    return rows


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["SD1.5", "SDXL"], default=["SD1.5", "SDXL"])
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 25, 20])
    parser.add_argument("--add", action="store_true", help="to the last record's other networks")
    parser.add_argument(
        "--only", nargs="+", default=SHOWN, help="settings of `propagation` whose names begin with one of these"
    )
    parser.add_argument("--memory", type=float, default=1e9, metavar="GB")
    parser.add_argument("--cache", type=Path, help="not used: nothing here is worth keeping")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        rows = [row for name in args.models for row in measure(host, name, args)]
    columns = [
        "network",
        "steps",
        "setting",
        "whole",
        "shorter",
        "times less computing",
        "times less time",
        "outside %",
    ]
    note = "FLOPs are counted operator by operator. Outside: share of the time outside of the network."
    title = f"Whole runs, {args.pixels} px, {args.dtype}, relative to the plain run of as many steps"
    path = args.out / "results" / "whole_runs.json"
    if args.add and path.exists():
        known = [table for table in json.loads(path.read_text("utf-8"))["tables"] if table["title"] == title]
        rows = [row for table in known for row in table["rows"] if row[0] not in args.models] + rows
    table = Table(title, columns, rows, note)
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    record("whole_runs", "Whole runs on networks of real size", [table], began, (), notes, args.out)
    print(markdown(table))


if __name__ == "__main__":
    main()
