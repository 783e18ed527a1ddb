"""What does asking less cost? Forecasts, one-sided steps and reused features beside what others published.

python dev.py bench step_cost [--runs unet:euler:50:3 flow:euler:50:3 …] [--tasks 16] [--only WORD …] [--search 16]
    [--add]

Every setting draws the same prompts and noises as the plain run of as many steps, through the host. Speed is counted:
the rows that enter the network's first layer and its middle, of both prompts, a shorter step by the costs of the
blocks of the demo model and of published networks (SD1.5 at 512, SDXL; SD3 medium, Flux.1). Ours, forecasts and fitted
sampler: fitted by their nodes on a picture of each of four prompts; --search: what the node is told there. PSNR (dB,
pixels) and perceptual distance are to the plain run, with the standard error over groups of seeds. The rivals are
`rivals.py`'s, core's caches core's. MagCache's ratios and SeaCache's thresholds are measured on a run of another
prompt. Plot and comparisons take the first published network's costs. Writes docs/results/step_cost.json,
docs/results.md and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from peers import cache_node
from propagation import COSTS_OF, FIRST, ONE, REUSES, TOP, TWO, networks, node, pack

from comfy_process import Host
from harness import CACHE, Cell, Drawn, Lab, Task, code_digest, prompt, tasks
from looks import look, summary
from results import DOCS, Table, markdown, record
from rivals import Rival, sea_filtered, with_rival
from schedules import number, progress

FORECASTS, FITTED = "ours, forecasts", "ours, fitted sampler"
FITTED_ONE_SIDED, FEWEST_ONE_SIDED = "ours, fitted and one-sided", 12  # its first and last three steps ask both
FAMILIES = ("ours, features", "ours, one-sided", FORECASTS, FITTED, FITTED_ONE_SIDED)
EVALUATIONS = (6, 8, 9, 10, 12, 16)
FITTED_TASK = Task(100, 3, 987654321)  # no task that is drawn
FITTED_PROMPTS = (prompt(100, 3), prompt(55, 9), prompt(13, 15), prompt(80, 0))
SHARES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
MOST_POINTS = 14
KEYS = ("psnr", "perceptual")
UNITS = 10_000  # of an evaluation, in which a lab keeps what a run costs
SHORTER = 1 << 32  # of these units of shorter evaluations are kept beside them, in one number
OTHERS_AT = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)  # times less computing: ours and others' best are compared


@dataclass(frozen=True)
class Run:
    model: str
    sampler: str
    steps: int
    cfg: float

    def __str__(self) -> str:
        return f"{self.model}, {self.sampler}, {self.steps} steps, cfg {self.cfg:g}"


@dataclass
class Row:
    run: str
    label: str
    speeds: dict[str, float]  # network -> how many times less computing than the plain run
    summary: dict[str, tuple[float, float]]

    @property
    def speed(self) -> float:
        """By the costs that plot and comparisons take."""
        return self.speeds[COSTS_OF[self.run.split(",")[0]]]


class RivalLab(Lab):
    """A lab that knows rivals, whose profiles are named by file, and whose runs tell their cost in evaluations: of
    whole ones, and SHORTER times of shorter ones, both in UNITS."""

    search = 0  # short runs that look for better steps of forecasts

    def given(self, name: str, value, part=()):
        if name == "profile" and isinstance(value, str):
            return pack("models.store").load_profile(self.cache / value)
        return super().given(name, value, part)

    def patched(self, model: str, nodes, part=()):
        rivals = [inputs for name, inputs in nodes if name == "rival"]
        found = super().patched(model, tuple(one for one in nodes if one[0] != "rival"), part)
        for name, numbers, sigmas in rivals:
            found = with_rival(found, Rival(name, numbers), sigmas)
        return found

    def path(self, cell: Cell, part: list[Task]) -> Path:
        found = super().path(cell, part)
        return found.with_stem(f"{found.stem}-kinds") if reused(cell) else found

    def _draw(self, cell: Cell, part: list[Task]) -> Drawn:
        with rows(self.models[cell.model]) as counted:
            drawn = super()._draw(cell, part)
        each = UNITS / (2 * len(part))
        whole, shorter = counted["middle"], counted["first"] - counted["middle"]
        return Drawn(drawn.latents, round(each * whole) + SHORTER * round(each * shorter))


def reused(cell: Cell) -> str:
    """What the shorter steps of a cell reuse, by its name in REUSES; "": it has none."""
    if any(name == "rival" and inputs[0] == "DBCache" for name, inputs in cell.nodes):
        return FIRST
    said = next((dict(inputs).get("reuse", "") for name, inputs in cell.nodes if name.startswith("Attune")), "")
    return said if said in REUSES[cell.model] else ""


def speeds(lab: RivalLab, goal: Cell, cell: Cell, work: list[Task]) -> dict[str, float]:
    """How many times less computing a cell takes than the plain run, by the costs of each network."""
    shorter, whole = divmod(lab.run(cell, work).calls, SHORTER)
    part = reused(cell)
    return {
        name: lab.run(goal, work).calls / (whole + (network.share(part) * shorter if part else shorter))
        for name, network in networks(lab, goal.model).items()
    }


@contextlib.contextmanager
def rows(model: Any) -> Iterator[dict[str, int]]:
    """How many rows enter the first layer, and a block that every reuse passes over."""
    network, counts = model.model.diffusion_model, {"first": 0, "middle": 0}
    unet = hasattr(network, "input_blocks")
    watched = {
        "first": network.input_blocks[0][0] if unet else network.x_embedder,
        "middle": network.middle_block[0] if unet else network.joint_blocks[1],
    }

    def see(name: str):
        def hook(_, args, kwargs) -> None:
            counts[name] += next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)).shape[0]

        return hook

    handles = [layer.register_forward_pre_hook(see(name), with_kwargs=True) for name, layer in watched.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# --- what is compared ---


def adds_noise(sampler: str) -> bool:
    return any(word in sampler for word in ("ancestral", "sde"))


def settings(lab: RivalLab, run: Run) -> dict[str, Cell]:
    """By label, the plain run first."""
    levels = lab.sigmas(run.model, "normal", run.steps)
    plain = Cell(run.model, run.sampler, levels, run.cfg)
    found = {"plain": plain}
    noisy = adds_noise(run.sampler)
    for share in SHARES if not noisy else ():
        steps = round(share * run.steps)
        found[f"fewer steps, {steps}"] = replace(plain, sigmas=lab.sigmas(run.model, "normal", steps))
    found |= {f"EasyCache {t}": replace(plain, nodes=cache_node("EasyCache", t)) for t in (0.02, 0.1, 0.2)
              if run.model == "unet"}  # fmt: skip
    found |= {f"LazyCache {t}": replace(plain, nodes=cache_node("LazyCache", t)) for t in (0.02, 0.1)}
    cheapest = REUSES[run.model][-1]
    if run.model == "unet":
        deep = node(reuse=ONE, forecast=False, keep_last=0, interval=3)
        found["DeepCache 3"] = replace(plain, nodes=deep)
    for label, name, numbers in rivals(lab, run, levels):
        found[label] = replace(plain, nodes=(("rival", (name, numbers, levels)),))
    alone = node(interval=1, reuse=cheapest, keep_last=3, guidance="every second step")
    found["ours, one-sided steps alone"] = replace(plain, nodes=alone)
    for n in (2, 3, 5):
        every = {"reuse": cheapest, "interval": n, "keep_last": 4}
        found[f"ours, features, every {n}"] = replace(plain, nodes=node(**every))
        found[f"ours, features, every {n}, one-sided"] = replace(
            plain, nodes=node(**every, guidance="every second step")
        )
    if noisy:
        for reuse in (TOP, TWO) if run.model == "unet" else (FIRST,):
            for n in (2, 3):
                every = node(reuse=reuse, interval=n, keep_last=4)
                found[f"ours, features, every {n}, {reuse}"] = replace(plain, nodes=every)
            calibrated = fitted(lab, run, reuse)
            for point in pack("models.store").load_profile(calibrated).key_steps.points:
                nodes = node(mode="speed target", reuse=reuse, speed=point.speed, profile=calibrated.name)
                found[f"ours, features, {len(point.keys)} fitted key steps, {reuse}"] = replace(plain, nodes=nodes)
    profile = fitted(lab, run)
    points = pack("models.store").load_profile(profile).key_steps.points
    for point in points[:: -(-len(points) // MOST_POINTS)]:
        nodes = node(mode="speed target", reuse="automatic", speed=point.speed, profile=profile.name)
        found[f"{FORECASTS}, {len(point.keys)} asked, {len(point.one_sided)} one-sided"] = replace(plain, nodes=nodes)
    path = None if noisy else fitted_sampler(lab, run, levels)
    if path is not None:
        for one in pack("models.store").load_profile(path).runs:
            used = ("AttuneApplyProfile", (("profile", path.name), ("steps", one.run.steps)))
            short = replace(plain, sampler=used, sigmas=tuple(one.run.sigmas))
            found[f"{FITTED}, {one.run.steps}"] = short
            if one.run.steps >= FEWEST_ONE_SIDED:
                found[f"{FITTED_ONE_SIDED}, {one.run.steps}"] = replace(short, nodes=alone)
    return found


def rivals(lab: RivalLab, run: Run, levels: tuple[float, ...]) -> list[tuple[str, str, tuple]]:
    """(label, name, settings) of what is published."""
    found: list[tuple[str, str, tuple]] = []
    found += [(f"Spectrum {a:g}, w {w:g}", "Spectrum", (a, w)) for a, w in ((0.75, 0.5), (0.75, 1.0), (3.0, 0.5))]
    found += [(f"TaylorSeer N{n} O{o}", "TaylorSeer", (n, o)) for n in (2, 3, 5) for o in (1, 2)]
    found += [(f"FSampler h{o}/s{n}", "FSampler", (o, n)) for o, n in ((2, 2), (3, 3))]
    found += [(f"Adaptive Guidance {g:g}", "Adaptive Guidance", (g,)) for g in (0.991, 0.997)]
    states, slopes = recorded(lab, run, levels)
    sizes = [float(one.norm()) for one in slopes]
    ratios = (1.0, *(round(b / a, 6) for a, b in pairwise(sizes)))
    found += [(f"MagCache E{e:g} K{k}", "MagCache", (ratios, e, k)) for e, k in ((0.03, 2), (0.12, 4))]
    for share in (0.6, 0.4):
        delta = sea_threshold(states, levels, run.model == "flow", share)
        found.append((f"SeaCache {share:g}", "SeaCache", (delta, run.model == "flow")))
    if run.model == "flow":  # of transformers alone
        found += [(f"DBCache R{r:g} W{w}", "DBCache", (r, w)) for r, w in ((0.08, 8), (0.2, 8), (0.4, 4))]
    return found


def recorded(lab: RivalLab, run: Run, levels: tuple[float, ...]) -> tuple[list, list]:
    """States and slopes of a plain run of another prompt."""
    from comfy.patcher_extension import WrappersMP

    states: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []

    def hear(executor, x, sigma, *args, **kwargs):
        answer = executor(x, sigma, *args, **kwargs)
        states.append(x.clone())
        slopes.append((x - answer) / float(sigma[0]))
        return answer

    stock = lab.models[run.model]
    lab.models[run.model] = stock.clone()
    lab.models[run.model].add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "bench.hear", hear)
    try:
        Lab._draw(lab, Cell(run.model, run.sampler, levels, run.cfg), [FITTED_TASK])
    finally:
        lab.models[run.model] = stock
    return states, slopes


def sea_threshold(states: list, levels: tuple[float, ...], flow: bool, share: float) -> float:
    """The delta with which this share of the recorded run's steps would be asked, by bisection."""
    scale = lambda s: 1.0 if flow else (1 + s * s) ** -0.5
    seen = [
        sea_filtered(x * scale(s), 1 - s if flow else scale(s), s if flow else s * scale(s))
        for x, s in zip(states, levels, strict=False)
    ]
    moves = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(seen)]

    def asked(delta: float) -> float:
        count, total = 1, 0.0
        for move in moves:
            total += move
            if total >= delta:
                count, total = count + 1, 0.0
        return count / (len(moves) + 1)

    low, high = 0.0, sum(moves)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if asked(middle) > share else (low, middle)
    return round(high, 6)


def kept(lab: RivalLab, run: Run, what: str = "") -> tuple[str, Path | None]:
    """The name of what is fitted for a run, and its file if it is there."""
    facts = f"{run} {lab.digests[run.model]} {code_digest()} {FITTED_PROMPTS}{what}"
    stem = f"step-cost-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"
    return stem, next(lab.cache.glob(f"{stem}.*"), None)


def fitted_sampler(
    lab: RivalLab, run: Run, levels: tuple[float, ...], evaluations: tuple[int, ...] = EVALUATIONS
) -> Path | None:
    """The node's own sampler in the place of the run, on one picture each of four other prompts; None: not proved."""
    stem, path = kept(lab, run, f"{FITTED} {evaluations}")
    if path is not None:
        return path
    model, counts = lab.models[run.model], [n for n in evaluations if n <= 0.6 * run.steps]
    channels = model.get_model_object("latent_format").latent_channels
    profile, *_ = lab.host.call(
        "AttuneFitSampler", model=model, positive=lab.conditioning(list(FITTED_PROMPTS)),
        negative=lab.conditioning([""] * len(FITTED_PROMPTS)), cfg=run.cfg, seed=FITTED_TASK.seed, preset="mini",
        sampler=lab.host.call("KSamplerSelect", sampler_name=run.sampler)[0], budget_minutes=0.0,
        latent={"samples": torch.zeros(len(FITTED_PROMPTS), channels, 16, 16)}, steps=counts[0], coefficients=True,
        more_steps=", ".join(map(str, counts[1:])), sigmas=torch.tensor(levels),
    )  # fmt: skip
    return pack("models.store").save_profile(profile, lab.cache, stem) if hasattr(profile, "runs") else None


def fitted(lab: RivalLab, run: Run, reuse: str = "nothing asked") -> Path:
    """The node's own forecasts, on one picture each of four other prompts; two each where the solver adds noise. With
    another `reuse` its key steps, on as many pictures of one prompt."""
    features = reuse in REUSES[run.model]
    search = 0 if features else lab.search
    stem, path = kept(lab, run, reuse if features else f"search {search}" if search else "")
    if path is not None:
        return path
    model, pictures = lab.models[run.model], (4 if features else 1) * (2 if adds_noise(run.sampler) else 1)
    channels = model.get_model_object("latent_format").latent_channels
    profile, *_ = lab.host.call(
        "AttuneFitPropagation", model=model, positive=lab.conditioning([FITTED_PROMPTS[0]]),
        **{f"positive_{n}": lab.conditioning([text]) for n, text in enumerate(FITTED_PROMPTS[1:], start=2)},
        negative=lab.conditioning([""]),
        latent_image={"samples": torch.zeros(pictures, channels, 16, 16)},
        seed=FITTED_TASK.seed, steps=run.steps, cfg=run.cfg, sampler_name=run.sampler, scheduler="normal",
        reuse=reuse, fastest=2.5 if features else 8.0, longest=4, search=search,
    )  # fmt: skip
    return pack("models.store").save_profile(profile, lab.cache, stem)


# --- figures ---


def measure(lab: RivalLab, run: Run, work: list[Task], only: list[str]) -> list[Row]:
    labelled = {
        label: cell for label, cell in settings(lab, run).items()
        if label == "plain" or not only or label.startswith(tuple(only))
    }  # fmt: skip
    goal, found = labelled["plain"], []
    for label, cell in labelled.items():
        seen = look(lab, cell, work, progress(f"{run} {label}"), goal)
        told = {key: value for key, value in summary(seen, work).items() if key in KEYS}
        row = Row(str(run), label, speeds(lab, goal, cell, work), told)
        found.append(row)
        print(f"\r{run}: {label}: {row.speed:.2f} times less computing, {number(row.summary['psnr'])} dB", flush=True)
    return found


def table(found: list[Row]) -> Table:
    told = lambda row: [None if row.label == "plain" else number(row.summary[key]) for key in KEYS]
    body = [
        [row.label, *(f"{speed:.2f}" for speed in row.speeds.values()), *told(row)]
        for row in sorted(found, key=lambda row: row.speed)
    ]
    times = [f"times less, {name}" for name in found[0].speeds]
    return Table(found[0].run, ["setting", *times, "PSNR dB", "perceptual"], body)


def faster(found: list[Row]) -> list[Row]:
    """The settings that save anything."""
    return [row for row in found if row.speed > 1.005]


def front(found: list[Row]) -> list[str]:
    """The labels that no other beats in speed and in fidelity."""
    better = lambda a, b: a.speed >= b.speed and a.summary["psnr"][0] > b.summary["psnr"][0]
    return [r.label for r in faster(found) if not any(better(other, r) for other in found)]


def before(out: Path, without: set[str]) -> list[list[Row]]:
    """The blocks of the last record, but for these runs."""
    rows = [
        Row(*(row[field.name] for field in fields(Row)))
        for row in json.loads((out / "results" / "step_cost.json").read_text("utf-8"))["data"]
    ]
    return [list(found) for run, found in groupby(rows, lambda row: row.run) if run not in without]


def fronts_table(blocks: list[list[Row]]) -> Table:
    body = [[found[0].run, "; ".join(front(found))] for found in blocks]
    return Table("What nothing beats in both speed and fidelity", ["run", "settings"], body)


def beside_table(blocks: list[list[Row]]) -> Table:
    """What is the most faithful at so many times less computing, ours and of others."""
    body = []
    for found in blocks:
        for least in OTHERS_AT:
            fast = [row for row in found if row.speed >= least - 0.005]
            sides = [[row for row in fast if row.label.startswith("ours") == own] for own in (True, False)]
            best = [max(side, key=lambda row: row.summary["psnr"][0], default=None) for side in sides]
            if any(best):
                told = [[row.label, number(row.summary["psnr"])] if row else ["–", None] for row in best]
                body.append([found[0].run, f"{least:g}", *told[0], *told[1]])
    columns = ["run", "times", "ours", "PSNR dB", "of others", "PSNR dB"]
    return Table("The most faithful at so many times less computing, or more", columns, body)


def family(label: str) -> str:
    """The line that a setting lies on in the plot."""
    return next((one for one in FAMILIES if label.startswith(one)), label.split(",")[0].split(" ")[0])


def plot(blocks: list[list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wide, high = min(len(blocks), 3), -(-len(blocks) // 3)
    names = list(dict.fromkeys([*FAMILIES, *(family(row.label) for found in blocks for row in found)]))
    figure, axes = plt.subplots(high, wide, figsize=(4.6 * wide, 4.8 * high), layout="constrained", squeeze=False)
    for axis, found in zip(axes.flat, blocks, strict=False):
        lines: dict[str, list[Row]] = {}
        for row in faster(found):
            lines.setdefault(family(row.label), []).append(row)
        for name, many in lines.items():
            x, y, error = zip(*sorted((r.speed, *r.summary["psnr"]) for r in many), strict=True)
            look = {"lw": 2.2 if name.startswith("ours") else 0.9, "color": f"C{names.index(name) % 10}"}
            axis.errorbar(x, y, error, fmt="o-", ms=3, label=name, alpha=0.9, **look)
        costs = COSTS_OF[found[0].run.split(",")[0]]
        axis.set(title=found[0].run, xlabel=f"times less computing, {costs}", ylabel="PSNR to plain, dB", xscale="log")
        axis.set_xticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # below: lines go all over
    for axis in axes.flat[len(blocks) :]:
        axis.remove()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", metavar="MODEL:SAMPLER:STEPS:CFG",
        default=["unet:euler:50:3", "flow:euler:50:3", "unet:euler:50:7", "unet:dpmpp_2m:20:3", "flow:dpmpp_2m:20:3",
                 "unet:euler_ancestral:25:3"],
    )  # fmt: skip
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[], help="settings whose names begin with one of these")
    parser.add_argument("--search", type=int, default=0, help="of a fit of forecasts")
    parser.add_argument("--add", action="store_true", help="to the last record's other runs")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    began = time.perf_counter()
    parts = [one.split(":") for one in args.runs]
    runs = [Run(model, sampler, int(steps), float(cfg)) for model, sampler, steps, cfg in parts]
    with tempfile.TemporaryDirectory() as folder:
        lab, work = RivalLab(Host(Path(folder)), args.cache), tasks(args.tasks)
        lab.search = args.search
        blocks = [measure(lab, run, work, args.only) for run in runs]
    blocks = [*(before(args.out, {block[0].run for block in blocks}) if args.add else []), *blocks]
    args.out.mkdir(parents=True, exist_ok=True)
    plot(blocks, args.out / "step_cost.png")
    notes = [" ".join(__doc__.split("\n\n")[2].split()), f"{args.tasks} pictures; schedule normal."]
    data = [
        {**vars(row), "speed": row.speed, "summary": {k: list(v) for k, v in row.summary.items()}}
        for found in blocks
        for row in found
    ]
    tables = [fronts_table(blocks), beside_table(blocks), *map(table, blocks)]
    record("step_cost", "Asking less", tables, began, ["step_cost.png"], notes, args.out, data)
    print("\r" + "\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
