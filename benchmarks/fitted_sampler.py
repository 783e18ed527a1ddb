"""What does a run fitted to a long one gain over all that costs as little? What carries over, and does it know?

python dev.py bench fitted_sampler [--parts fewer short path exact carries blind seconds] [--models unet flow]

Parts, each against the same pictures drawn by everything else:
- fewer, short: the user's own run of 50 steps of Euler (UNet: karras, flow: beta) at three cfg, or of 20 of DPM++ 2M.
  Attune Fast Sampler learns it from one picture; how many evaluations reach 45 dB of it on other prompts and seeds?
- path: fits to the exact path as by Attune Fit Sampler, beside the best free run of as many steps.
- exact: the same where the answer is known.
- carries: fits used with other prompts, backgrounds, guidance, sizes, a LoRA, a ControlNet, fp16, and whether the sign
  of leaving the fitted range tells where they fail.
- blind: six fitted steps beside 16 and 20 of the best stock run, by the judge's features.
- seconds: a session of two pictures, and the arithmetic of a step.
Beside them: every stock solver without added noise on every stock schedule, first on a few pictures, then the best on
many; forecasts of the answers between fewer full calls; core's caches, DeepCache and our propagation; OLSS; a searched
plan of a unified solver. Every run is kept: in parts with --draw-only, then --drawn for a page of what is there. Writes
docs/results/fitted_sampler.json, docs/results.md, a sheet of pictures and the tables in docs/fitted_sampler.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fitted_blind
import fitted_carries
import fitted_fewer
import fitted_path
import fitted_targets
from comfy_process import Host
from fitted_fewer import OF_2M, SCHEDULE, Own
from fitted_lab import FitLab, Scene, learned_from, work_of
from fitted_peers import SOLVERS
from harness import CACHE, Task, counting, prompt
from results import DOCS, Table, fill, markdown, record

PARTS = ("fewer", "short", "path", "exact", "carries", "blind", "seconds")
CFGS = {"unet": (3.0, 7.0, 1.5), "flow": (3.0, 5.0, 1.5)}
COUNTS, MORE, SHORT_COUNTS = (6, 8, 10, 12, 15), (20, 30), (8, 10, 12)
USED = 10  # evaluations, where one count must do
SESSION, ARITHMETIC = "A session of two pictures", "The arithmetic of a step"
LATENT = (1, 4, 128, 128)  # of SDXL at 1024 px
STEP_GOAL, FIT_GOAL, FIT_STEPS = 2.0, 800, 8
QUICK = {
    "models": ["flow"], "cfg_index": [0], "tasks": [4], "peers": [4], "fits": 1, "counts": [4, 6], "steps": 12,
    "short_steps": 6, "more": [], "solvers": ["euler", "heun"], "screen": 1, "finalists": 1, "caches": False,
    "trials": 4, "plans": [4], "path_counts": [5, 6], "path_fits": 1, "converged": 24,
    "targets": ["two bumps on a line"], "carried": 2, "carry_fits": 1, "cfgs": [2.0], "sides": [96], "pictures": [],
    "pairs": 4, "many": [8], "rounds": 1,
}  # fmt: skip


# --- seconds ---


def seconds(lab: FitLab, args: argparse.Namespace) -> list[Table]:
    """A session of two pictures through SamplerCustom, with the node and without; a step's arithmetic."""
    fresh, single = work_of(1), learned_from(1)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    body = []
    for model in args.models:
        own, n = Own(Scene(model), args.steps, "euler", SCHEDULE[model]), min(USED, args.steps - 2)
        stock = lab.solver(own.goal(lab))
        least = [math.inf] * 4
        calls = [0] * 4
        said: list[str] = []
        session = [("", single[0]), ("", fresh[0]), ("learn again", single[0]), ("auto", fresh[0])]
        for _ in range(args.rounds):
            for i, (use, task) in enumerate(session):
                sampler = stock
                if use:
                    wish = {"use": use, "evaluations": n, "fidelity": 0.0, "check_every": 0}
                    (sampler,) = lab.host.call("AttuneFastSampler", sampler=stock, **wish)
                    sampler._say = said.append
                with counting(lab.models[model]) as counted:
                    began = clock()
                    custom(lab, own, sampler, task)
                    least[i] = min(least[i], clock() - began)
                calls[i] = counted[0]
        plain, ours = least[0] + least[1], least[2] + least[3]
        body.append(
            [model, *(f"{s:.2f} ({c})" for s, c in zip(least, calls, strict=True)), f"{ours / plain:.2f}",
             f"{(calls[2] + calls[3]) / (calls[0] + calls[1]):.2f}", f"{least[1] / least[3]:.2f}",
             f"{least[2] - least[0]:.2f}"]
        )  # fmt: skip
        assert "Learned" in said[0] and said[1].startswith("The short run"), said
    columns = ["model", "plain, first", "plain, second", "node, first", "node, second", "both, node / plain"]
    columns += ["the same in evaluations", "second, times faster", "learning, s"]
    note = (
        f"Seconds of SamplerCustom on one picture (evaluations): {args.steps} steps of Euler, {n} evaluations in the "
        f"short run; the least of {args.rounds} rounds in one process, the processor's where there is no GPU."
    )
    return [Table(SESSION, columns, body, note), arithmetic(lab)]


def custom(lab: FitLab, own: Own, sampler: Any, task: Task) -> Tensor:
    scene, model = own.scene, lab.models[own.scene.model]
    channels = model.get_model_object("latent_format").latent_channels
    return lab.host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=task.seed, cfg=scene.cfg,
        positive=lab.conditioning([prompt(task.obj, task.background)]), negative=lab.conditioning([""]),
        sampler=sampler, sigmas=torch.tensor(own.goal(lab).sigmas),
        latent_image={"samples": torch.zeros(1, channels, scene.side // 8, scene.side // 8)},
    )[0]["samples"]  # fmt: skip


def arithmetic(lab: FitLab, rounds: int = 20) -> Table:
    """What a step costs besides the network, at the latent size of SDXL."""
    import comfy.k_diffusion.sampling

    fast = lab.host.module("nodes._host.fitted_sampler")
    sigmas = torch.linspace(10, 0, USED + 1)
    numbers = tuple((0.1, 0.1, *[0.1] * min(i, 2)) for i in range(USED))
    run = fast.FittedRun(sigmas=tuple(sigmas.tolist()), numbers=numbers, shares=(0.1,) * USED)
    x, answer = torch.randn(LATENT), torch.randn(LATENT)
    none = lambda x, sigma, **_: answer

    def with_sign() -> None:
        probes: list[Tensor] = []
        fast.sample_attune_fitted(none, x, sigmas, disable=True, fitted_run=run, probes=probes)
        fast.distance(run, probes)

    ways = {
        "euler": lambda: comfy.k_diffusion.sampling.sample_euler(none, x, sigmas, disable=True),
        "fitted": lambda: fast.sample_attune_fitted(none, x, sigmas, disable=True, fitted_run=run),
        "fitted, with its sign": with_sign,
    }
    least = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            least[name] = min(least[name], (time.perf_counter() - began) / USED)
    body = [[name, f"{1e6 * one:.0f}", f"{one / least['euler']:.2f}"] for name, one in least.items()]
    note = f"{USED} steps without a network on latents of {' x '.join(map(str, LATENT))}, the least of {rounds} rounds."
    return Table(ARITHMETIC, ["run", "microseconds a step", "beside Euler"], body, note)


def bars_of_cost(lab: FitLab, timed: Sequence[Table]) -> list[list]:
    """The evaluations of a fit with the smallest preset, and a step's arithmetic."""
    plan, presets = lab.host.module("nodes._plan.fit_run"), lab.host.module("kernels.tuner").TUNER_PRESETS
    host = lab.host.module("nodes._host.fit_run")
    rivals = len(host.RIVALS) * host.SCHEDULES
    calls = plan.evaluations(presets["mini"], presets["mini"].reference_steps, [FIT_STEPS], rivals, True)
    rows = [
        [f"evaluations of a fit for {FIT_STEPS}, mini, exact path", f"<= {FIT_GOAL}", str(calls), calls <= FIT_GOAL]
    ]
    for table in timed:
        if table.title == ARITHMETIC:
            said = next(row[2] for row in table.rows if row[0] == "fitted")
            rows.append(["a step's arithmetic beside Euler's", f"<= {STEP_GOAL:g}", said, float(said) <= STEP_GOAL])
    return rows


# --- the record ---


def bars_table(rows: Sequence[list]) -> Table:
    body = [[figure, goal, found, "met" if met else "**missed**"] for figure, goal, found, met in rows]
    return Table("Goals", ["figure", "goal", "found", ""], body, "Set before any of this was built.")


def last_seconds(out: Path) -> list[Table]:
    """The tables of seconds of the last record, where nothing must be drawn."""
    path = out / "results" / "fitted_sampler.json"
    known = json.loads(path.read_text("utf-8"))["tables"] if path.exists() else []
    return [Table(**one) for one in known if one["title"] in (SESSION, ARITHMETIC)]


def measured(lab: FitLab, args: argparse.Namespace) -> tuple[list[Table], list[Table], list[fitted_blind.Pick]]:
    """Tables for the method's page, further ones for the results, and what the sheet shows."""
    page: list[Table] = []
    further: list[Table] = []
    bars: list[list] = []
    picks: list[fitted_blind.Pick] = []
    places = [i for i in range(3) if i in args.cfg_index]
    of = lambda many, i: many[min(i, len(many) - 1)]
    blocks = []
    if "fewer" in args.parts:
        for i in places:
            for model in args.models:
                own, peers = (
                    Own(Scene(model, CFGS[model][i]), args.steps, "euler", SCHEDULE[model]),
                    "best" if i else "all",
                )
                blocks.append(
                    fitted_fewer.measure(lab, own, args.counts, (of(args.tasks, i), of(args.peers, i)), args, peers)
                )
    if "short" in args.parts:
        counts = [n for n in SHORT_COUNTS if n < args.short_steps] or [args.short_steps // 2]
        for model in args.models:
            own = Own(Scene(model), args.short_steps, "dpmpp_2m", OF_2M[model])
            blocks.append(fitted_fewer.measure(lab, own, counts, (args.tasks[0], args.peers[0]), args, "own"))
    if blocks:
        bars += fitted_fewer.bars(blocks)
        page.append(fitted_fewer.fewer_table(blocks))
        further += [fitted_fewer.pairs_table(blocks, args.screen), *(block.table for block in blocks)]
    if "path" in args.parts:
        scenes = [(Scene(model, CFGS[model][i]), i) for i in places for model in args.models]
        counts = lambda i: args.path_counts if i == 0 else [n for n in (6, 8) if n in args.path_counts]
        reached = [one for scene, i in scenes if (one := fitted_path.measure(lab, scene, counts(i), args)) is not None]
        bars += fitted_path.bars(reached)
        page += [fitted_path.table(reached), fitted_path.reach_table(reached)]
        further += [fitted_path.finalists_table(one) for one in reached if one.solvers]
    if "exact" in args.parts:
        exact = fitted_targets.measure(lab, args)
        bars += fitted_targets.bars(exact)
        page.append(fitted_targets.table(exact))
    if "carries" in args.parts:
        carried = [fitted_carries.measure(lab, model, CFGS[model][0], args) for model in args.models]
        page += [fitted_carries.totals(lab, carried), *(fitted_carries.table(lab, *one) for one in carried)]
    if "blind" in args.parts:
        picks = [one for model in args.models if (one := fitted_blind.measure(lab, model, args)) is not None]
        bars += fitted_blind.bars(picks)
        page.append(fitted_blind.table(picks))
    if "seconds" in args.parts:
        timed = last_seconds(args.out) if args.drawn else [] if args.draw_only else seconds(lab, args)
        bars += bars_of_cost(lab, timed)
        page += timed
    return [bars_table(bars), *page], further, picks


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CFGS), default=list(CFGS))
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--cfg-index", nargs="+", type=int, choices=range(3), default=[0, 1, 2], help="of each model's three cfg")
    add("--tasks", nargs="+", type=int, default=[48], help="pictures of the fitted runs, by cfg; multiples of 24")
    add("--peers", nargs="+", type=int, default=[24], help="pictures of everything else, by cfg")
    add("--fits", type=int, default=6, help="single pictures that are learned from")
    add("--steps", type=int, default=50, help="of the long run")
    add("--short-steps", type=int, default=20, help="of the long run of DPM++ 2M")
    add("--counts", nargs="+", type=int, default=list(COUNTS), help="evaluations")
    add("--more", nargs="*", type=int, default=list(MORE), help="further ones of what comes near with those")
    add("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    add("--screen", type=int, default=2, help="pictures on which every solver is tried on every schedule")
    add("--finalists", type=int, default=3, help="of these that are drawn for all pictures")
    add("--caches", action=argparse.BooleanOptionalAction, default=True)
    add("--cached", type=int, default=24, help="pictures of these")
    add("--trials", type=int, default=40, help="of the search for a plan")
    add("--plans", nargs="*", type=int, default=[USED], help="evaluations for which one is searched")
    add(
        "--path-counts",
        nargs="+",
        type=int,
        default=list(fitted_path.COUNTS),
        help="evaluations of fits to the exact path",
    )
    add("--path-fits", type=int, default=2, help="of four prompts and two noises each")
    add("--converged", type=int, default=96, help="steps of the pictures that count as converged")
    add("--targets", nargs="+", choices=list(fitted_targets.TARGETS), default=list(fitted_targets.TARGETS))
    add("--exact-steps", nargs="+", type=int, default=[8])
    add("--carried", type=int, default=12, help="pictures of each use")
    add("--carry-fits", type=int, default=3)
    add("--cfgs", nargs="*", type=float, default=[0.5, 0.75, 1.2, 1.5, 2.0], help="times the fitted one")
    add("--sides", nargs="*", type=int, default=[96, 160])
    add("--pictures", nargs="*", type=int, default=list(fitted_carries.BATCHES), help="of fits to batches")
    add("--pairs", type=int, default=64)
    add("--many", nargs="+", type=int, default=list(fitted_blind.STOCK), help="stock evaluations of a blind pick")
    add("--rounds", type=int, default=2)
    add("--quick", action="store_true", help="a minute of everything, which shows that it runs")
    add("--cache", type=Path, default=CACHE)
    add("--out", type=Path, default=DOCS)
    add("--draw-only", action="store_true", help="keep what is drawn, write nothing")
    add("--drawn", action="store_true", help="draw nothing: what is kept, dashes for the rest")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def main() -> None:
    args, began = arguments(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab = FitLab(Host(Path(folder)), args.cache)
        lab.drawn_only = args.drawn
        page, further, picks = measured(lab, args)
        print("\r" + " " * 100 + "\n" + "\n".join(map(markdown, [*page, *further])))
        if args.draw_only:
            return
        if picks:
            fitted_blind.sheet(lab, picks, args.out / fitted_blind.PICTURE)
    sheets = [fitted_blind.PICTURE] if picks else []
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    record("fitted_sampler", "A short run fitted to a long one", [*page, *further], began, sheets, notes, args.out)
    fill(args.out / "fitted_sampler.md", "fitted_sampler", page)


if __name__ == "__main__":
    main()
