"""Core nodes that change the model: what do EasyCache and LazyCache save, what do RescaleCFG and zero-SNR levels mend?

python dev.py bench peers [--models unet flow] [--sampler euler] [--steps 20 50] [--tasks 48]

Every cache at three thresholds, against the plain run and against plain runs with fewer steps, which is what a cache
has to beat. PSNR is to the plain run of the same number of steps and the same noise; Fréchet distance and brightness
are to the training data, as in `schedules`. Pictures are cached, times are taken anew. Writes docs/results/peers.json,
docs/results.md and a plot.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from comfy_process import Host
from harness import CACHE, Cell, Lab, Task, tasks
from looks import look, summary
from results import DOCS, Table, markdown, record
from schedules import number, progress

THRESHOLDS = (0.05, 0.1, 0.2)
SHARES = (0.8, 0.6, 0.5, 0.4)  # of the steps: the plain runs that a cache must beat
TIMED = 4  # pictures in the batch whose sampling is timed
TIMING = f"Time is the least of three samplings of a batch of {TIMED}, all settings in turn in this run."
MENDS = {
    "RescaleCFG 0.7": (("RescaleCFG", (("multiplier", 0.7),)),),
    "zero-SNR levels": (("ModelSamplingDiscrete", (("sampling", "v_prediction"), ("zsnr", True))),),
}


@dataclass
class Row:
    model: str
    label: str
    steps: int
    calls: int
    time: float  # of sampling, relative to the plain run
    summary: dict[str, tuple[float, float]]


def cache_node(name: str, threshold: float) -> tuple:
    inputs = (("reuse_threshold", threshold), ("start_percent", 0.15), ("end_percent", 0.95), ("verbose", False))
    return ((name, inputs),)


def settings(model: str, steps: int) -> dict[str, tuple[int, tuple]]:
    """Label -> (steps, nodes), the plain run first. EasyCache has no hook in SD3's network: there it does nothing."""
    caches = ("EasyCache", "LazyCache") if model == "unet" else ("LazyCache",)
    found: dict[str, tuple[int, tuple]] = {"plain": (steps, ())}
    found |= {f"plain, {round(share * steps)} steps": (round(share * steps), ()) for share in SHARES}
    found |= {f"{name} {t}": (steps, cache_node(name, t)) for name in caches for t in THRESHOLDS}
    return found | ({label: (steps, nodes) for label, nodes in MENDS.items()} if model == "unet" else {})


def sigmas(lab: Lab, model: str, steps: int, nodes: tuple) -> tuple[float, ...]:
    """The "normal" levels of the model after its nodes: zero-SNR nodes move them."""
    inputs = {"scheduler": "normal", "model": lab.patched(model, nodes), "steps": steps, "denoise": 1.0}
    return tuple(lab.host.call("BasicScheduler", **inputs)[0].tolist())


def measure(lab: Lab, work: list[Task], model: str, sampler: str, steps: int) -> list[Row]:
    goal = Cell(model, sampler, sigmas(lab, model, steps, ()))
    labelled = {
        label: Cell(model, sampler, sigmas(lab, model, count, nodes), nodes=nodes)
        for label, (count, nodes) in settings(model, steps).items()
    }
    seconds = lab.seconds(list(labelled.values()), work[:TIMED])
    rows = []
    for (label, cell), spent in zip(labelled.items(), seconds, strict=True):
        seen = look(lab, cell, work, progress(f"{model} {steps} {label}"), goal)
        rows.append(Row(model, label, steps, lab.run(cell, work).calls, spent / seconds[0], summary(seen, work)))
    return rows


def table(rows: list[Row], sampler: str) -> Table:
    keys = ["psnr", "perceptual", "frechet", "wasserstein", "brightness", "object", "background"]
    body = [
        [r.label, r.calls, f"{r.time:.2f}", *(None if r.label == "plain" and k in keys[:2] else number(r.summary[k])
                                              for k in keys)]
        for r in rows
    ]  # fmt: skip
    return Table(
        f"{rows[0].model}, {sampler}, {rows[0].steps} steps",
        [
            "setting",
            "calls",
            "time",
            "PSNR dB",
            "perceptual",
            "Fréchet",
            "Wasserstein",
            "brightness",
            "object",
            "background",
        ],
        body,
        "PSNR and perceptual distance (thousandths) to the plain run of the same noise; the rest to the data.",
    )


def plot(blocks: list[list[Row]], path: Path) -> None:
    """Fidelity against cost, one panel per model and number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(blocks), figsize=(3.6 * len(blocks), 3.2), layout="constrained", squeeze=False)
    for axis, rows in zip(axes[0], blocks, strict=True):
        for name, style in {"plain, ": "k.-", "EasyCache": "C0o-", "LazyCache": "C1s-"}.items():
            line = sorted(
                (r.time, r.summary["psnr"][0], r.summary["psnr"][1]) for r in rows if r.label.startswith(name)
            )
            if line:
                x, y, error = zip(*line, strict=True)
                axis.errorbar(x, y, error, fmt=style, label="fewer steps" if name == "plain, " else name)
        axis.set(
            title=f"{rows[0].model}, {rows[0].steps} steps", xlabel="time, plain run = 1", ylabel="PSNR to plain, dB"
        )
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["unet", "flow"], default=["unet", "flow"])
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab, work = Lab(Host(Path(folder)), args.cache), tasks(args.tasks)
        blocks = [measure(lab, work, model, args.sampler, steps) for model in args.models for steps in args.steps]
    plot(blocks, args.out / "peers.png")
    notes = [" ".join(__doc__.split("\n\n")[2].split()), f"{args.tasks} pictures per setting; cfg 3. {TIMING}"]
    tables = [table(rows, args.sampler) for rows in blocks]
    data = [{**vars(row), "summary": {k: list(v) for k, v in row.summary.items()}} for rows in blocks for row in rows]
    record("peers", "Core's caches and rescaling nodes", tables, began, ["peers.png"], notes, args.out, data)
    print("\r" + "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
