"""What does reusing features cost in fidelity, at which speed? Ours, core's caches, and fewer plain steps.

python dev.py bench propagation [--models unet flow] [--samplers euler dpmpp_2m] [--steps 50 25 20] [--tasks 32]

Every setting draws the same prompts and noises as the plain run of as many steps. PSNR and perceptual distance are to
that run, Fréchet distance is to the training data; the spread is over disjoint groups of seeds. Speed is counted, not
timed: how often the network ran whole and how often in part, weighed with the cost of its blocks on the demo model and
on published networks. "DeepCache N": one block fresh, held, every N-th step. "calibrated": fitted by the pack on
another prompt and seed. Results are cached; with --add what the last record has and is not drawn again stays in it.
Writes docs/results/propagation.json, docs/results.md, a plot and a grid of pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from peers import cache_node
from PIL import Image, ImageDraw

from comfy_process import ROOT, Host
from harness import BATCH, CACHE, Cell, Lab, Task, code_digest, prompt, tasks
from looks import look, summary
from real_size import FLUX, build
from results import DOCS, Table, markdown, record
from schedules import number, progress

TOP, TWO, ONE, ENCODER = "top level fresh", "two levels fresh", "one block fresh", "encoder reused"
FIRST, ENDS, BEGINNING = "first block fresh", "first and last blocks fresh", "first two thirds reused"
REUSES = {"unet": (ENCODER, TOP, TWO, ONE), "flow": (BEGINNING, ENDS, FIRST)}
NODE = "AttunePropagation"
CACHES = {"unet": ("EasyCache", "LazyCache"), "flow": ("LazyCache",)}  # EasyCache has no hook in SD3's network
INTERVALS = (2, 3, 5)
LONGER_ENDS = (4, 6)  # whole steps at the end, instead of 2
THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
SHARES = (0.8, 0.6, 0.5, 0.4)  # of the steps: the plain runs that a cache must beat
FITTED = 4  # pictures of a calibration where the solver adds noise, since every noise has its own errors
FAITHFUL = 45.0  # dB to the uncached run
PICTURED, PICTURED_TASKS = (1.3, 1.5, 1.8), 4
PICTURES = ["propagation.png", "propagation_grid.jpg"]
KEYS = ["psnr", "perceptual", "frechet", "object", "background"]
# The published networks whose costs weigh the counts, by their name in `real_size` and the side of their latents.
PUBLISHED = {
    "unet": {"SD1.5 512": ("SD1.5", 64), "SDXL 1024": ("SDXL", 128)},
    "flow": {"SD3 medium": ("SD3-medium", 128), "Flux.1": (FLUX, 128)},
}
COSTS_OF = {"unet": "SD1.5 512", "flow": "SD3 medium"}  # the first of them
# Method -> how its settings' labels begin, and its line in the plot.
METHODS = {
    "fewer steps": ("plain, ", "k.--"), "EasyCache": ("EasyCache", "C0o-"), "LazyCache": ("LazyCache", "C1s-"),
    "DeepCache": ("DeepCache", "C2^-"), "published keys": ("published", "C3*"), ENCODER: (ENCODER, "C4v-"),
    ONE: (ONE, "C5D-"), TOP: (TOP, "C6P-"), TWO: (TWO, "C9h-"), BEGINNING: (BEGINNING, "C4v-"), ENDS: (ENDS, "C6P-"),
    FIRST: (FIRST, "C5D-"),
    "calibrated": ("calibrated", "C7X-"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    steps: int
    nodes: tuple = ()
    reuse: str = ""  # what the shorter steps of our nodes reuse


@dataclass
class Row:
    run: Run
    label: str
    whole: float  # evaluations of the whole network
    part: int  # of a part of it
    speed: dict[str, float]  # network -> how many times less computing than the plain run
    summary: dict[str, tuple[float, float]]


def pack(module: str) -> ModuleType:
    """A module of the pack as the host has loaded it."""
    return sys.modules[f"{ROOT}.{module}"]


# --- what is compared ---


def node(**changed) -> tuple:
    """The pack's node with its defaults but for those given."""
    inputs = {
        "mode": "uniform", "interval": 3, "speed": 1.5, "reuse": "", "forecast": True, "keep_last": 2,
        "start_percent": 0.0, "end_percent": 1.0, "prior_noise": 0.0, "cache_dtype": "as computed",
        "cache_device": "as computed", "memory_limit": 0, "parallel": "off", **changed,
    }  # fmt: skip
    return ((NODE, tuple(inputs.items())),)


def settings(model: str, steps: int) -> dict[str, Setting]:
    """By label, the plain run first."""
    held, *_ = REUSES[model]
    found = {"plain": Setting(steps)}
    found |= {f"plain, {round(share * steps)} steps": Setting(round(share * steps)) for share in SHARES}
    found |= {f"{name} {t}": Setting(steps, cache_node(name, t)) for name in CACHES[model] for t in THRESHOLDS}
    if model == "unet":
        deep = {"reuse": ONE, "forecast": False, "keep_last": 0}
        found |= {f"DeepCache {n}": Setting(steps, node(interval=n, **deep), ONE) for n in INTERVALS}
    published = {"mode": "published keys", "reuse": held}
    found["published keys"] = Setting(steps, node(**published), held)
    found["published keys, prior noise"] = Setting(steps, node(prior_noise=0.003, **published), held)
    for reuse in REUSES[model]:
        found |= {f"{reuse}, every {n}": Setting(steps, node(reuse=reuse, interval=n), reuse) for n in INTERVALS}
    cheapest = REUSES[model][-1]
    for last in LONGER_ENDS:
        kept = node(reuse=cheapest, interval=2, keep_last=last)
        found[f"{cheapest}, every 2, last {last}"] = Setting(steps, kept, cheapest)
    return found


class CalibratedLab(Lab):
    """A lab whose cells name profiles by file: nodes get what is in them."""

    def given(self, name: str, value, part: Sequence[Task]):
        if name == "profile":
            return pack("models.store").load_profile(self.cache / value)
        return super().given(name, value, part)


def calibrated(lab: Lab, model: str, sampler: str, steps: int, drawn: bool) -> dict[str, Setting]:
    """The settings of the pack's own calibration, on a prompt and a seed that no task has; `drawn`: if it is there."""
    facts = f"{lab.digests[model]} {sampler} {steps} {FITTED} {code_digest()}"
    stem = f"propagation-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"
    path = next(lab.cache.glob(f"{stem}.*"), None)
    if path is None and drawn:
        return {}
    path = path or fit(lab, model, sampler, steps, stem)
    demo = networks(lab, model)["demo"].reuses
    found = {}
    for point in pack("models.store").load_profile(path).key_steps.points:
        reuse = next(
            name for name, part in demo.items() if (part.fresh, part.cut) == (point.reuse.fresh, point.reuse.cut)
        )
        nodes = node(mode="speed target", reuse=reuse, speed=point.speed, profile=path.name)
        found[f"calibrated {point.speed:.2f}"] = Setting(steps, nodes, reuse)
    return found


def fit(lab: Lab, model: str, sampler: str, steps: int, stem: str) -> Path:
    pictures = FITTED if "ancestral" in sampler else 1
    (latent,) = lab.host.call("EmptyLatentImage", width=128, height=128, batch_size=pictures)
    profile, _, _ = lab.host.call(
        "AttuneFitPropagation", model=lab.models[model], positive=lab.conditioning([prompt(100, 3)]),
        negative=lab.conditioning([""]), latent_image=latent, seed=987654321, steps=steps, cfg=3.0,
        sampler_name=sampler, scheduler="normal", reuse=REUSES[model][-1], fastest=3.0, longest=5,
    )  # fmt: skip
    return pack("models.store").save_profile(profile, lab.cache, stem)


# --- what it costs ---


def batches(work: list[Task]) -> list[list[Task]]:
    return [work[start : start + BATCH] for start in range(0, len(work), BATCH)]


@dataclass(frozen=True)
class Network:
    """The costs of a network's blocks, and what each of our reuses means on it."""

    costs: Any
    reuses: dict[str, Any]

    def share(self, reuse: str) -> float:
        """What a shorter step costs."""
        return self.costs.of_step(self.reuses[reuse])


@lru_cache
def networks(lab: Lab, model: str) -> dict[str, Network]:
    """The demo model and the published networks, by name."""
    found = {"demo": network(lab.models[model].model.diffusion_model, 16)}
    for name, (family, side) in PUBLISHED[model].items():
        found[name] = network(build(family, "meta").model.diffusion_model, side)
    return found


def network(module: Any, side: int) -> Network:
    """For latents of `side` x `side`."""
    names = pack("nodes._plan.propagation")
    if hasattr(module, "input_blocks"):
        costs = pack("nodes._host.propagation.unet").measure_unet(module, side, side).costs
        n, levels = len(costs.input), pack("nodes._host.propagation.unet").levels_above(module)
        return Network(costs, {name: names.reuse_by_name(name, False, n, levels) for name in names.UNET_PARTS})
    host = pack("nodes._host.propagation.transformer")
    costs = host.costs_of(module, host.blocks_of(module).values())
    n = len(costs.input)
    return Network(costs, {name: names.block_reuse_by_name(name, False, n) for name in names.TRANSFORMER_PARTS})


@contextlib.contextmanager
def counting(model: Any) -> Iterator[dict[str, int]]:
    """Count how often a block that every reuse skips, and the end of the network, run."""
    module, counts = model.model.diffusion_model, {"middle": 0, "end": 0}
    is_unet = hasattr(module, "middle_block")
    watched = {
        "middle": module.middle_block[0] if is_unet else module.joint_blocks[1],
        "end": module.out if is_unet else module.final_layer,
    }

    def see(name: str) -> Callable:
        def hook(*_) -> None:
            counts[name] += 1

        return hook

    handles = [part.register_forward_pre_hook(see(name)) for name, part in watched.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def count(lab: Lab, cell: Cell, work: list[Task]) -> tuple[float, int]:
    """(whole, shorter) evaluations of one guided run, counted once per cell.

    Ours follow from the settings alone: one picture is enough. Core's caches look at each batch: the mean counts.
    """
    if not any(id_ == NODE for id_, _ in cell.nodes):
        return statistics.mean(lab.run(cell, part).calls for part in batches(work)), 0
    one = tasks(1)
    known = lab.path(cell, one).with_suffix(".json")
    if not known.exists():
        lab.path(cell, one).unlink(missing_ok=True)
        with counting(lab.models[cell.model]) as counts:
            lab.run(cell, one)
        known.write_text(json.dumps([counts["middle"], counts["end"] - counts["middle"]]), "utf-8")
    whole, part = json.loads(known.read_text("utf-8"))
    return whole, part


# --- the measurement ---


@dataclass(frozen=True)
class Run:
    """One panel of the plot: every setting with one model, solver and number of steps."""

    model: str
    sampler: str
    steps: int
    tasks: int

    def cell(self, lab: Lab, setting: Setting) -> Cell:
        return Cell(self.model, self.sampler, lab.sigmas(self.model, "normal", setting.steps), nodes=setting.nodes)

    def settings(self, lab: Lab, only: list[str], drawn: bool = False) -> dict[str, Setting]:
        """Those whose labels begin with one of `only`, after the plain run; `drawn`: that earlier runs have drawn."""
        every = settings(self.model, self.steps)
        if any(word.startswith("calibrated") for word in only):
            every |= calibrated(lab, self.model, self.sampler, self.steps, drawn)
        wanted = {label: s for label, s in every.items() if label == "plain" or label.startswith(tuple(only))}
        return {label: s for label, s in wanted.items() if not drawn or self.is_drawn(lab, s)}

    def is_drawn(self, lab: Lab, setting: Setting) -> bool:
        return all(lab.path(self.cell(lab, setting), part).exists() for part in batches(tasks(self.tasks)))

    def __str__(self) -> str:
        return f"{self.model}, {self.sampler}, {self.steps} steps, {self.tasks} pictures"


def measure(lab: Lab, run: Run, labelled: dict[str, Setting]) -> list[Row]:
    known, rows, work = networks(lab, run.model), [], tasks(run.tasks)
    goal = run.cell(lab, Setting(run.steps))
    for label, setting in labelled.items():
        cell = run.cell(lab, setting)
        seen = look(lab, cell, work, progress(f"{run} {label}"), goal)
        whole, part = count(lab, cell, work)
        plain = rows[0].whole if rows else whole
        shares = {name: network.share(setting.reuse) if setting.reuse else 0.0 for name, network in known.items()}
        speed = {name: plain / (whole + part * share) for name, share in shares.items()}
        rows.append(Row(run, label, whole, part, speed, summary(seen, work)))
    return rows


def recorded(out: Path) -> list[list[Row]]:
    """The runs of the last record, each with its settings."""
    data = json.loads((out / "results" / "propagation.json").read_text("utf-8"))["data"]
    found: dict[Run, list[Row]] = {}
    for row in data:
        run = Run(row["model"], row["sampler"], row["steps"], row["tasks"])
        means = {name: (float(value), float(error)) for name, (value, error) in row["summary"].items()}
        found.setdefault(run, []).append(Row(run, row["label"], row["whole"], row["part"], row["speed"], means))
    return list(found.values())


def added(new: list[list[Row]], old: list[list[Row]], only: Sequence[str]) -> list[list[Row]]:
    """The old runs in their order, those that were drawn again replaced, then the others. A run that was drawn again on
    as many pictures keeps its old rows whose labels begin with none of `only`."""
    of = lambda rows: (rows[0].run.model, rows[0].run.sampler, rows[0].run.steps)
    again = {of(rows): rows for rows in new}
    drawn = lambda label: label == "plain" or label.startswith(tuple(only))

    def joined(rows: list[Row]) -> list[Row]:
        fresh = again.pop(of(rows), None)
        if fresh is None:
            return rows
        kept = rows if fresh[0].run == rows[0].run else []
        return [*fresh, *(row for row in kept if not drawn(row.label))]

    return [joined(rows) for rows in old] + list(again.values())


# --- tables ---


def table(rows: list[Row]) -> Table:
    names = list(rows[0].speed)
    body = [
        [r.label, r.whole, r.part, *(f"{r.speed[n]:.2f}" for n in names),
         *(None if r.label == "plain" and k in KEYS[:2] else number(r.summary[k]) for k in KEYS)]
        for r in rows
    ]  # fmt: skip
    columns = ["setting", "whole", "part", *(f"speed, {n}" for n in names)]
    return Table(
        str(rows[0].run),
        [*columns, "PSNR dB", "perceptual", "Fréchet", "object", "background"],
        body,
        "PSNR and perceptual distance (thousandths) to the plain run of the same noise; the rest to the data.",
    )


def of_method(rows: list[Row], method: str) -> list[Row]:
    return [row for row in rows if row.label.startswith(METHODS[method][0])]


def faithful_table(blocks: list[list[Row]], model: str) -> Table:
    """Per method the fastest setting that nobody can tell from the plain run."""
    names = list(PUBLISHED[model])
    methods = [m for m in METHODS if any(of_method(rows, m) for rows in blocks if rows[0].run.model == model)]
    body = []
    for rows in (rows for rows in blocks if rows[0].run.model == model):
        for name in names:
            line: list = [f"{rows[0].run.sampler}, {rows[0].run.steps}", name]
            for method in methods:
                known = (row for row in of_method(rows, method) if name in row.speed)  # some rows are older
                speeds = [row.speed[name] for row in known if faithful(row, rows[0])]
                line.append(f"{max(speeds):.2f}" if speeds else None)
            fastest = max((float(value) for value in line[2:] if value), default=0.0)
            body.append(line[:2] + [f"**{v}**" if v and float(v) == fastest else v for v in line[2:]])
    return Table(
        f"{model}: the fastest setting with at least {FAITHFUL:g} dB",
        ["solver, steps", "costs of", *methods],
        body,
        "Times less computing than the plain run, at a mean PSNR to it of at least this and a Fréchet distance within "
        "two standard errors of its own; –: no setting that was tried. The best is bold.",
    )


def faithful(row: Row, plain: Row) -> bool:
    (distance, error), (of_plain, _) = row.summary["frechet"], plain.summary["frechet"]
    return row.summary["psnr"][0] >= FAITHFUL and distance <= of_plain + 2 * error


def limits_table(lab: Lab, models: list[str]) -> Table:
    """Costs of a shorter step, and the speed that no number of them can exceed."""
    body = [
        [name, reuse, f"{100 * network.share(reuse):.1f} %", f"{1 / network.share(reuse):.2f}"]
        for model in models
        for name, network in networks(lab, model).items()
        for reuse in REUSES[model]
    ]
    return Table(
        "What a shorter step costs, by the multiplications of its blocks", ["network", "reuse", "cost", "limit"], body
    )


# --- pictures ---


def plot(lab: Lab, blocks: list[list[Row]], path: Path) -> None:
    """Fidelity against speed by the costs of a published network, one panel per model, sampler and number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    across = min(3, len(blocks))
    down = -(-len(blocks) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(4.2 * across, 3.6 * down), layout="constrained", squeeze=False
    )  # fmt: skip
    for axis, rows in zip(grid.flat, blocks, strict=False):
        model, costs = rows[0].run.model, next(iter(PUBLISHED[rows[0].run.model]))
        for method, (_, style) in METHODS.items():
            line = sorted((r.speed[costs], *r.summary["psnr"]) for r in of_method(rows, method))
            if line:
                x, y, error = zip(*line, strict=True)
                axis.errorbar(x, y, error, fmt=style, label=method, markersize=5)
        axis.axhline(FAITHFUL, color="0.85", zorder=0)
        for reuse in REUSES[model][:2]:
            limit = 1 / networks(lab, model)[costs].share(reuse)
            axis.axvline(limit, color="0.7", linestyle=":")
            axis.text(
                limit, 1, f"limit, {reuse} ", rotation=90, va="top", ha="right", fontsize=7, color="0.5",
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip
        axis.set(
            title=str(rows[0].run), xlim=(0.9, 4.2), ylim=(25, 75), xlabel=f"times less computing, {costs} costs",
            ylabel="PSNR to plain, dB",
        )  # fmt: skip
        axis.legend(fontsize=6)
    for axis in grid.flat[len(blocks) :]:
        axis.remove()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def chosen(rows: list[Row], costs: str) -> list[Row]:
    """The plain run, our most faithful settings at three speeds, and every peer's at the highest of them."""
    ours = [row for row in rows if row.label.startswith((TOP, ONE, "calibrated"))]
    found = [rows[0]]
    for speed in PICTURED:
        found += _best([row for row in ours if row.speed[costs] >= speed])
    for method in ("fewer steps", "EasyCache", "LazyCache", "DeepCache", "published keys"):
        peers = of_method(rows, method)
        fast = [row for row in peers if row.speed[costs] >= PICTURED[-1]]
        found += _best(fast) or sorted(peers, key=lambda row: row.speed[costs])[-1:]
    return found


def _best(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.summary["psnr"][0])[-1:]


def write_pictures(lab: Lab, rows: list[Row], path: Path, side: int = 128) -> None:
    """The same prompts and noises, tasks down, settings across."""
    run = rows[0].run
    costs = next(iter(PUBLISHED[run.model]))
    shown, known = chosen(rows, costs), run.settings(lab, [row.label for row in rows])
    work, head = tasks(run.tasks)[:BATCH], 44
    canvas = Image.new("RGB", (side * len(shown), head + side * PICTURED_TASKS), "white")
    pen = ImageDraw.Draw(canvas)
    for column, row in enumerate(shown):
        below = f"{row.speed[costs]:.2f}x" + (f", {row.summary['psnr'][0]:.1f} dB" if column else "")
        pen.text((column * side + 3, 2), "\n".join([*textwrap.wrap(row.label, 21)[:2], below]), "black", font_size=10)
        drawn = lab.run(run.cell(lab, known[row.label]), work).latents[:PICTURED_TASKS]
        for line, picture in enumerate(lab.pictures(run.model, drawn)):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels), (column * side, head + line * side))
    canvas.save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(REUSES), default=list(REUSES))
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m", "euler_ancestral"])
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 25, 20])
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--runs", nargs="+", metavar="MODEL:SAMPLER:STEPS:TASKS", help="instead of all combinations")
    parser.add_argument(
        "--only", nargs="+", default=[start for start, _ in METHODS.values()],
        help="settings whose names begin with one of these",
    )  # fmt: skip
    parser.add_argument("--drawn", action="store_true", help="only settings that earlier runs have drawn")
    parser.add_argument("--add", action="store_true", help="to the last record, instead of making a new one")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began = time.perf_counter()
    every = [word.split(":") for word in args.runs or ()]
    every = every or list(itertools.product(args.models, args.samplers, args.steps, [args.tasks]))
    runs = [Run(model, sampler, int(steps), int(count)) for model, sampler, steps, count in every]
    with tempfile.TemporaryDirectory() as folder:
        lab = CalibratedLab(Host(Path(folder)), args.cache)
        blocks = [measure(lab, run, run.settings(lab, args.only, args.drawn)) for run in runs]
        drawn_first = blocks[0]
        if args.add:
            blocks = added(blocks, recorded(args.out), args.only)
        models = list(dict.fromkeys(rows[0].run.model for rows in blocks))
        tables = [limits_table(lab, models), *(faithful_table(blocks, model) for model in models), *map(table, blocks)]
        plot(lab, blocks, args.out / PICTURES[0])
        if blocks[0] is drawn_first:
            write_pictures(lab, blocks[0], args.out / PICTURES[1])
    notes = [" ".join(__doc__.split("\n\n")[2].split()), "cfg 3; schedule normal."]
    data = [
        {**vars(row.run), **vars(row), "run": str(row.run), "summary": {k: list(v) for k, v in row.summary.items()}}
        for rows in blocks
        for row in rows
    ]
    record("propagation", "Propagation", tables, began, PICTURES, notes, args.out, data)
    print("\r" + "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
