"""Do cheap drafts of many seeds rank them as the whole pictures do? Ours beside core's caches and fewer steps.

python dev.py bench draft_seeds [--runs unet:euler:50:3 flow:euler:50:3 unet:dpmpp_2m:20:3] [--speed 5] [--seeds 16]

Every prompt is drawn from as many noises, whole and by each way of drafting, through the host. Computing is counted:
rows that enter the network, in percent of the whole runs'. *features*: Spearman's rank correlation over the seeds of a
prompt between drafts and whole pictures, mean over the 32 principal axes of the judge's features; *log p*: that of the
judge's log-probability of what the prompt asks for; *same best*: in how many prompts the best draft by it is the best
picture. Standard errors over the prompts. Ours, learned: Attune Draft Seeds without a profile; its ranks are of the
seeds that are drafted, its computing is of all, the two whole ones and the fit included. Ours, by a profile of
forecasts, or by a fitted sampler: fitted to four other prompts. EasyCache and LazyCache have the smallest of some
thresholds that is as fast as asked for, or the largest. Writes docs/results/draft_seeds.json, docs/results.md and a
picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import cache_node
from propagation import node, pack
from scipy.stats import spearmanr
from step_cost import EVALUATIONS, RivalLab, Run, fitted, fitted_sampler, rows
from torch import Tensor

import _pack  # noqa: F401 - makes the pack importable
from comfy_process import Host
from harness import CACHE, Cell, Task, prompt
from judge import load_judge
from looks import data, measured
from results import DOCS, Table, command_line, markdown, record
from schedules import progress

THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
FIRST_SEED = 7000
WHOLE = 2  # seeds that Attune Draft Seeds draws whole
COLUMNS = ["way", "computing, %", "features", "log p", "same best, %", "PSNR dB"]


@dataclass
class Way:
    """One way of drafting: its cost in parts of the whole runs, latents [n ...], and from which seed on they count."""

    label: str
    cost: float
    latents: Tensor
    first: int = 0


def pairs(prompts: int, seeds: int) -> list[Task]:
    """Every prompt with as many seeds of its own, in a row; none of them is a prompt that forecasts are fitted to."""
    return [
        Task((41 * i + 5) % 128, (3 * i + 1) % 20, FIRST_SEED + 1000 * i + j)
        for i in range(prompts)
        for j in range(seeds)
    ]


def ways(lab: RivalLab, run: Run, work: list[Task], seeds: int, speed: float) -> list[Way]:
    """The whole runs first."""
    levels, few = lab.sigmas(run.model, "normal", run.steps), max(1, int(run.steps / speed))
    plain = Cell(run.model, run.sampler, levels, run.cfg)
    whole = lab.run(plain, work[:1]).calls
    cells = {"whole": plain, "fewer steps": replace(plain, sigmas=lab.sigmas(run.model, "normal", few))}
    cells["stopped there, its own guess"] = replace(plain, sigmas=(*levels[:few], 0.0))
    for cache in ("EasyCache", "LazyCache"):
        tried = {t: replace(plain, nodes=cache_node(cache, t)) for t in THRESHOLDS}
        fast = (t for t, cell in tried.items() if lab.run(cell, work[:seeds]).calls * speed <= whole)
        threshold = next(fast, THRESHOLDS[-1])
        cells[f"{cache} {threshold:g}"] = tried[threshold]
    profile = fitted(lab, run)
    fastest = max(point.speed for point in pack("models.store").load_profile(profile).key_steps.points)
    nodes = node(mode="speed target", reuse="automatic", speed=min(speed, fastest), profile=profile.name)
    cells["ours, by a profile"] = replace(plain, nodes=nodes)
    sampler = fitted_sampler(lab, run, levels, EVALUATIONS if few in EVALUATIONS else (few,))
    for one in pack("models.store").load_profile(sampler).runs if sampler else ():
        if one.run.steps == few:
            used = ("AttuneApplyProfile", (("profile", sampler.name), ("steps", few)))
            cells["ours, fitted sampler"] = replace(plain, sampler=used, sigmas=tuple(one.run.sigmas))
    found = []
    for label, cell in cells.items():
        drawn = lab.run(cell, work, progress(f"{run} {label}"))
        found.append(Way(label, drawn.calls / whole, drawn.latents))
    return [*found, learned(lab, run, work, seeds, speed)]


def learned(lab: RivalLab, run: Run, work: list[Task], seeds: int, speed: float) -> Way:
    """By Attune Draft Seeds itself, prompt by prompt."""
    ours, model, parts = lab.host.module("nodes._host.draft_seeds"), lab.models[run.model], []
    empty = {"samples": torch.zeros(1, model.get_model_object("latent_format").latent_channels, 16, 16)}
    with rows(model) as counted, torch.inference_mode():
        for start in range(0, len(work), seeds):
            some = work[start : start + seeds]
            positive = lab.conditioning([prompt(some[0].obj, some[0].background)])
            asked = ours.WholeRun(positive, lab.conditioning([""]), empty, run.steps, run.cfg, run.sampler, "normal")
            latents, said = ours.draw_drafts(model, asked, [task.seed for task in some], speed, 16, None)
            parts.append(latents)
            progress(f"{run} learned")(said)
    return Way("ours, learned", counted["first"] / (2 * run.steps * len(work)), torch.cat(parts), WHOLE)


def ranks(features: Tensor, whole: Tensor, obj: int) -> tuple[float, float, float]:
    """Of one prompt's drafts with its whole pictures, [seeds 256] each: features, log p, and 100 where the best is the
    same, else 0."""
    axes, head = data()["axes"], load_judge().head
    each = [
        spearmanr(*pair).statistic for pair in zip(*((f.double() @ axes).T for f in (features, whole)), strict=True)
    ]
    own = [head(F.silu(f)).log_softmax(1)[:, obj] for f in (features, whole)]
    return statistics.fmean(each), float(spearmanr(*own).statistic), 100.0 * bool(own[0].argmax() == own[1].argmax())


def row(way: Way, pictures: Tensor, whole: Tensor, work: list[Task], seeds: int) -> list:
    """A way's pictures beside the whole runs', as the table has it."""
    seen, goal = measured(pictures, whole), measured(whole, whole)
    kept = [range(start + way.first, start + seeds) for start in range(0, len(work), seeds)]
    found = [ranks(seen["features"][k], goal["features"][k], work[k[0]].obj) for k in kept]
    psnr = [float(seen["psnr"][k].mean()) for k in kept]
    columns = [spread(values, n) for values, n in zip([*zip(*found, strict=True), psnr], (3, 3, 0, 1), strict=True)]
    return [way.label, f"{100 * way.cost:.1f}", *columns]


def spread(values, digits: int) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def picture(lab: RivalLab, run: Run, found: list[Way], seeds: int, path: Path) -> None:
    """The first prompt's seeds, whole and drafted, a row each."""
    draw = pack("nodes._draw.compare")
    shown = [
        one
        for one in found
        if one.label in ("whole", "ours, by a profile", "fewer steps")
        or one.label.startswith(("EasyCache", "LazyCache"))
    ]
    rows_ = [draw.Batch(w.label, lab.pictures(run.model, w.latents[:seeds][:6]).permute(0, 2, 3, 1)) for w in shown]
    draw.draw_comparison(rows_, 0, False, 128, 6).save(path, quality=88)


def kept_tables(out: Path, anew: list[Table]) -> list[Table]:
    """The last record's tables of other runs, each with the command that made it."""
    known = json.loads((out / "results" / "draft_seeds.json").read_text("utf-8"))
    titles = {table.title for table in anew}
    tables = [Table(**table) for table in known["tables"] if table["title"] not in titles]
    return [replace(table, command=table.command or known["command"]) for table in tables]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", metavar="MODEL:SAMPLER:STEPS:CFG",
        default=["unet:euler:50:3", "flow:euler:50:3", "unet:dpmpp_2m:20:3"],
    )  # fmt: skip
    parser.add_argument("--speed", type=float, default=5.0, help="times less computing that a draft is asked for")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--add", action="store_true", help="to the last record's other runs, and keep its picture")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began, work, tables = time.perf_counter(), pairs(args.prompts, args.seeds), []
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = RivalLab(Host(Path(folder)), args.cache)
        for number, one in enumerate(args.runs):
            model, sampler, steps, cfg = one.split(":")
            run = Run(model, sampler, int(steps), float(cfg))
            found = ways(lab, run, work, args.seeds, args.speed)
            whole, *others = (lab.pictures(run.model, way.latents) for way in found)
            body = [row(way, one, whole, work, args.seeds) for way, one in zip(found[1:], others, strict=True)]
            tables.append(Table(str(run), COLUMNS, body))
            print("\r" + markdown(tables[-1]), flush=True)
            if not number and not args.add:
                picture(lab, run, found, args.seeds, args.out / "draft_seeds.jpg")
    notes = [
        " ".join(__doc__.split("\n\n")[2].split()),
        f"{args.prompts} prompts, {args.seeds} seeds each; schedule normal.",
    ]
    if args.add:
        tables = [
            *kept_tables(args.out, tables),
            *(replace(one, command=command_line("draft_seeds")) for one in tables),
        ]
    record("draft_seeds", "Drafts of seeds", tables, began, ["draft_seeds.jpg"], notes, args.out)


if __name__ == "__main__":
    main()
