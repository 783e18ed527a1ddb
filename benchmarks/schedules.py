"""Stock schedules x solvers x steps on both demo models: which noise levels make the most of few steps?

python dev.py bench schedules [--models unet flow] [--samplers euler ...] [--steps 5 8 10 20 50] [--tasks 48]

Every prompt and seed is drawn through the host with each schedule, solver and number of steps. Measured: the Fréchet
distance of the pictures to training pictures of the same objects and backgrounds, whether the picture shows what the
prompt says, brightness, variety, and how far the picture is from the one that 200 steps make of the same noise. Errors
are standard errors over six disjoint groups of seeds. Results are cached: run it again to continue or to print. Writes
docs/results/schedules.json, docs/results.md, the tables in docs/schedules.md, three pictures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from comfy_process import Host
from harness import CACHE, Cell, Lab, Task, prompt, tasks
from judge import BACKGROUNDS
from looks import CONVERGED, GROUPS, Look, brightness, converged, data, look, summary, to_data
from metrics import frechet, rank_stability
from results import DOCS, Table, fill, markdown, record

STOCK = ["normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "kl_optimal"]
CORE = {"unet": ["core AYS", "core GITS"], "flow": ["core OptimalSteps"]}
OURS = {"unet": ["auto", "KL-optimal", "KL-optimal, c = 1.4"], "flow": ["KL-optimal", "KL-optimal, c = 1.4"]}
OURS_FOR = ("euler", "dpmpp_2m")  # up to 20 steps: where a schedule matters most
SOLVERS = ["euler", "dpmpp_2m", "uni_pc", "heun", "euler_ancestral"]
RANDOM = {"euler_ancestral"}  # adds its own noise: it has no converged picture
PICTURED = 8


@dataclass
class Row:
    """One schedule with one solver and one number of steps."""

    model: str
    sampler: str
    steps: int
    schedule: str
    seen: Look
    calls: int
    summary: dict[str, tuple[float, float]]


def names(model: str, sampler: str, steps: int) -> list[str]:
    ours = OURS[model] if sampler in OURS_FOR and steps <= 20 else []
    return [*STOCK, *CORE[model], *ours]


def measure(lab: Lab, work: list[Task], model: str, sampler: str, steps: int) -> list[Row]:
    """All schedules of one model, solver and number of steps."""
    rows = []
    for name in names(model, sampler, steps):
        cell = Cell(model, sampler, lab.sigmas(model, name, steps))
        seen = look(lab, cell, work, progress(f"{model} {sampler} {steps} {name}"))
        rows.append(Row(model, sampler, steps, name, seen, lab.run(cell, work).calls, summary(seen, work)))
    return rows


def progress(label: str) -> Callable[[str], None]:
    return lambda text: print(f"\r{label}: {text}   ", end="", flush=True)


def matrix(rows: list[Row], key: str, title: str, note: str = "") -> Table:
    """Schedules down, steps across: one measure with its standard error; the best of a column is bold."""
    best = min if key in LOWER else max
    steps = sorted({row.steps for row in rows})
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    winners = {n: best((r for r in rows if r.steps == n), key=lambda r: r.summary[key][0]).schedule for n in steps}
    body: list[list] = []
    for schedule in schedules:
        line: list = [schedule]
        for n in steps:
            found = [row for row in rows if row.schedule == schedule and row.steps == n]
            text = number(found[0].summary[key]) if found else None
            line.append(f"**{text}**" if found and winners[n] == schedule else text)
        body.append(line)
    return Table(title, ["schedule", *(f"{n} steps" for n in steps)], body, note)


LOWER = {"frechet", "kernel", "wasserstein", "brightness", "error", "perceptual"}


def number(measured: tuple[float, float]) -> str:
    return (
        f"{measured[0]:.2f} ± {measured[1]:.2f}" if abs(measured[0]) < 10 else f"{measured[0]:.1f} ± {measured[1]:.1f}"
    )


def everything(rows: list[Row], title: str, note: str) -> Table:
    """All measures of some rows."""
    keys = ["frechet", "kernel", "precision", "recall", "coverage", "wasserstein", "object", "background"]
    keys += ["brightness", "psnr", "perceptual"]
    columns = ["model", "solver", "steps", "schedule", *keys, "calls"]
    body = []
    for r in rows:
        cells = [None if r.sampler in RANDOM and k in ("psnr", "perceptual") else number(r.summary[k]) for k in keys]
        body.append([r.model, r.sampler, r.steps, r.schedule, *cells, r.calls])
    return Table(title, columns, body, note)


def stability(blocks: list[list[Row]], work: list[Task]) -> Table:
    """How many samples make the ranking of the schedules stable? Bootstrap over tasks, averaged over the blocks."""
    n, body = len(work), []
    for count in sorted({n // 4, n // 2, n}):
        pairs = {"PSNR": [], "Frechet": []}
        for rows in blocks:
            if rows[0].sampler not in RANDOM:
                psnrs = torch.stack([-row.seen.psnr for row in rows])
                pairs["PSNR"].append(rank_stability(lambda kept, s=psnrs: s[:, kept].mean(1), n, count, 500))
            distances = lambda kept, rows=rows: torch.tensor([to_data(frechet, r.seen.features, kept) for r in rows])
            pairs["Frechet"].append(rank_stability(distances, n, count, 20))
        cells = [f"{statistics.mean(p[i] for p in found):.2f}" for found in pairs.values() for i in (0, 1)]
        body.append([count, *cells])
    return Table(
        "How many samples make the ranking stable?",
        ["samples", "PSNR: Kendall τ", "PSNR: same winner", "Fréchet: Kendall τ", "Fréchet: same winner"],
        body,
        f"Samples drawn with replacement from the {n} of each cell; agreement with the ranking by all of them, mean "
        f"over {len(blocks)} combinations of model, solver and steps.",
    )


def quality_plot(rows: list[Row], key: str, label: str, path: Path) -> None:
    """Quality against steps: a panel per model and solver, a line per schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models, solvers = (list(dict.fromkeys(getattr(r, a) for r in rows)) for a in ("model", "sampler"))
    size = (3.2 * len(solvers) + 1.5, 2.8 * len(models))
    figure, axes = plt.subplots(len(models), len(solvers), figsize=size, layout="constrained", squeeze=False)
    for panels, model in zip(axes, models, strict=True):
        for axis, solver in zip(panels, solvers, strict=True):
            mine = [r for r in rows if r.model == model and r.sampler == solver]
            for i, name in enumerate(dict.fromkeys(r.schedule for r in mine if r.schedule != "auto")):
                line = sorted((r for r in mine if r.schedule == name), key=lambda r: r.steps)
                values = [r.summary[key] for r in line]
                style = "-" if name in STOCK else "--" if name.startswith("core") else ":"
                at, (mean, error) = [r.steps for r in line], zip(*values, strict=True)
                axis.errorbar(at, mean, error, label=name, ls=style, marker=".", lw=1.2, color=f"C{i % 10}")
            axis.set(
                title=f"{model}, {solver}", xscale="log", xlabel="steps", yscale="log" if key in LOWER else "linear"
            )
            axis.set_xticks(sorted({r.steps for r in mine}), sorted({r.steps for r in mine}))
            axis.minorticks_off()
        panels[0].set_ylabel(label)
        panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def picture_grid(lab: Lab, work: list[Task], sampler: str, steps: list[int], path: Path, side: int = 96) -> None:
    """One prompt and seed: schedules down, steps across, the unet left and the flow model right."""
    left, top, models = 120, 34, [m for m in ("unet", "flow") if m in lab.models]
    canvas = Image.new("RGB", (left + side * len(steps) * len(models), top + side * (len(STOCK) + 2)), "white")
    pen, task = ImageDraw.Draw(canvas), work[0]
    for i, model in enumerate(models):
        shown = [*STOCK, *CORE[model]]
        pen.text(
            (left + i * side * len(steps) + 4, 2), f"{model}, {sampler}: {prompt(task.obj, task.background)}", "black"
        )
        for row, name in enumerate(shown):
            pen.text((4, top + side * row + side // 2 - 6 + 12 * i * (row >= len(STOCK))), name, "black")
            for column, n in enumerate(steps):
                drawn = lab.run(Cell(model, sampler, lab.sigmas(model, name, n)), work[:16]).latents[:1]
                pixels = (lab.pictures(model, drawn)[0] * 255).round().byte().permute(1, 2, 0).numpy()
                at = (left + (i * len(steps) + column) * side, top + side * row)
                canvas.paste(Image.fromarray(pixels).resize((side, side), Image.LANCZOS), at)
                pen.text((at[0] + 4, 18), f"{n} steps", "black")
    canvas.save(path, quality=88)


def write_picture(lab: Lab, work: list[Task], sampler: str, steps: int, path: Path) -> None:
    """Stock "normal" above, "auto" below: the same prompts and seeds."""
    rows = []
    for name in ("normal", "auto"):
        drawn = lab.run(Cell("unet", sampler, lab.sigmas("unet", name, steps)), work)
        rows.append(torch.cat(list(lab.pictures("unet", drawn.latents[:PICTURED])), dim=2))
    Image.fromarray((torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()).save(path, quality=88)


def brightness_table(rows: list[Row], work: list[Task]) -> Table:
    """How bright is the background that a word asks for? One column per row given."""
    backgrounds = torch.tensor([task.background for task in work])
    columns = [brightness(row.seen.corners, backgrounds) for row in rows]
    words = list(BACKGROUNDS)
    body = [[words[b], f"{columns[0][b][0]:.1f}", *(f"{column[b][1]:.1f}" for column in columns)] for b in columns[0]]
    heads = [f"{row.model}, {row.sampler}, {row.schedule}, {row.steps} steps" for row in rows]
    return Table("Brightness of the background by word, 0..255", ["word", "data", *heads], body)


def brightness_plot(rows: list[Row], path: Path) -> None:
    """Histogram of the pictures' means against the data's for the same prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    bins, wanted = torch.linspace(0, 255, 18).numpy(), 255 * data()["means"][: len(rows[0].seen.means)].flatten()
    axis.hist(wanted.numpy(), bins, density=True, alpha=0.3, color="k", label="data")
    for row in rows:
        label = f"{row.model}, {row.sampler}, {row.schedule}, {row.steps} steps"
        axis.hist((255 * row.seen.means).numpy(), bins, density=True, histtype="step", label=label)
    axis.set(xlabel="mean of a picture's pixels", yticks=[])
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def perfect(count: int) -> Table:
    """The Frechet distance that pictures without any fault would show: nothing but the bias of few samples."""
    body = []
    for n in (count, len(data()["features"])):
        kept, known = torch.arange(n), data()
        sets = [known["features"][:, 1], known["unet"], known["flow"]]
        body.append([n, *(f"{to_data(frechet, features, kept):.3f}" for features in sets)])
    note = "Training pictures: placed anew, or only sent through a demo model's autoencoder."
    return Table("Fréchet distance of perfect pictures", ["samples", "placed anew", "unet", "flow"], body, note)


def best_of(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row.summary["frechet"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CORE), default=list(CORE))
    parser.add_argument("--samplers", nargs="+", default=SOLVERS)
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 10, 20, 50])
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--first-seed", type=int, default=0, help="for a second run with other noise")
    parser.add_argument("--converged", type=int, default=200, help="steps of the pictures that count as converged")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    if args.tasks < 2 * GROUPS:
        parser.error(f"--tasks must be at least {2 * GROUPS}: the spread is over {GROUPS} groups of seeds")
    began, blocks = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        lab, work = Lab(Host(Path(folder)), args.cache, args.converged), tasks(args.tasks, args.first_seed)
        for model in args.models:
            lab.run(converged(lab, model), work, progress(f"{model} converged"))
            for sampler in args.samplers:
                blocks += [measure(lab, work, model, sampler, steps) for steps in args.steps]
        write_picture(lab, work, "dpmpp_2m", 8, args.out / "aligned_schedule.jpg")
        picture_grid(lab, work, args.samplers[0], args.steps, args.out / "schedules_grid.jpg")
    print("\r" + " " * 70)
    rows = [row for block in blocks for row in block]
    tables, short = [], []
    for model in args.models:
        for sampler in args.samplers:
            mine = [row for row in rows if (row.model, row.sampler) == (model, sampler)]
            tables.append(matrix(mine, "frechet", f"{model}, {sampler}: Fréchet distance to the data"))
            if sampler not in RANDOM:
                goal = " on ".join(CONVERGED[model])
                note = f"Converged: {args.converged} steps of {goal}, from the same noise."
                tables.append(matrix(mine, "psnr", f"{model}, {sampler}: PSNR to the converged picture, dB", note))
                short += [tables[-1]] if sampler in OURS_FOR else []
    units = "kernel and perceptual in thousandths, wasserstein and brightness of 255, object and background in percent."
    best = everything([best_of(block) for block in blocks], "The best schedule of each, in all measures", units)
    normal = [row for row in rows if row.schedule == "normal"]
    tables = [
        stability(blocks, work),
        best,
        everything(normal, "The default `normal`, in all measures", units),
        *tables,
    ]
    quality_plot(rows, "frechet", "Fréchet distance", args.out / "schedules_frechet.png")
    exact = [row for row in rows if row.sampler not in RANDOM]
    quality_plot(exact, "psnr", "PSNR to converged, dB", args.out / "schedules_psnr.png")
    fill(args.out / "schedules.md", "schedules", short)
    most = [row for row in normal if row.sampler == args.samplers[0] and row.steps == max(args.steps)]
    tables.insert(4, brightness_table(most, work))
    brightness_plot(most, args.out / "schedules_brightness.png")
    pictures = ["schedules_frechet.png", "schedules_psnr.png", "schedules_grid.jpg", "schedules_brightness.png"]
    sampled = f"{args.tasks} pictures per setting, seeds from {args.first_seed}; cfg 3; {GROUPS} disjoint groups."
    notes = [" ".join(__doc__.split("\n\n")[2].split()), sampled]
    facts = [
        {"model": r.model, "sampler": r.sampler, "steps": r.steps, "schedule": r.schedule, "calls": r.calls,
         **{k: [round(x, 4) for x in v] for k, v in r.summary.items()}}
        for r in rows
    ]  # fmt: skip
    title = "Stock schedules, solvers and steps"
    result = record("schedules", title, tables, began, pictures, notes, args.out, facts)
    print("\n".join(markdown(Table(**table)) for table in result["tables"]))


if __name__ == "__main__":
    main()
