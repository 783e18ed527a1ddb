"""How near few steps come to the converged picture: fitted to the exact path, beside the best free run of as many."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fitted_lab import CHUNK, FitLab, How, Scene, jackknifed, learned_from, or_none, plus_minus, spread, work_of
from fitted_peers import Pair, deviation, screen, short_how
from harness import Task
from results import Table
from schedules import progress

COUNTS = (5, 6, 8, 10, 12)
LONG = 20  # steps of the best free run that fewer evaluations are to reach
SCREENED = (5, 8, 10, LONG)  # evaluations with which all stock pairs are tried
GOALS = {
    "unet": {5: 0.52, 6: 0.38, 8: 0.26, 10: 0.30, 12: 0.33}, "flow": {5: 0.55, 6: 0.46, 8: 0.36, 10: 0.38, 12: 0.42},
}  # fmt: skip
REACH = {"unet": 12, "flow": 14}
PROMPTS, NOISES = 4, 2  # of a fit
LATER = 40  # of the learned tasks, behind those of single pictures
ANOTHER = 1_000_000  # seeds on, another noise of the same prompt


@dataclass
class Reached:
    """One model and cfg: the deviation of each picture, by evaluations, of ours and of the best free runs."""

    scene: Scene
    ours: dict[int, Tensor]
    free: dict[int, tuple[Pair, Tensor]]
    solvers: dict[int, list[tuple[str, Tensor]]]


def converged(lab: FitLab, scene: Scene, args: argparse.Namespace) -> How:
    return lab.exact(scene.model, args.converged)


def fits_of(lab: FitLab, scene: Scene, counts: Sequence[int], args: argparse.Namespace) -> list[dict]:
    """Fits to the exact paths of some noises of some prompts each."""
    every = learned_from(LATER + args.path_fits * PROMPTS)[LATER:]
    parts = [every[i : i + PROMPTS] for i in range(0, len(every), PROMPTS)]
    again = lambda task, k: replace(task, seed=task.seed + k * ANOTHER)
    return [lab.followed(scene, [[again(task, k) for task in part] for k in range(NOISES)], counts) for part in parts]


def ours(lab: FitLab, scene: Scene, hows: Sequence[How], work: Sequence[Task]) -> Tensor:
    """Latents of a fitted run, each chunk of pictures by the next fit."""
    parts = [work[i : i + CHUNK] for i in range(0, len(work), CHUNK)]
    return torch.cat([lab.drawn(scene, hows[i % len(hows)], part).latents for i, part in enumerate(parts)])


def measure(lab: FitLab, scene: Scene, counts: Sequence[int], args: argparse.Namespace) -> Reached | None:
    """None where the converged pictures are not drawn."""
    many, say = work_of(args.tasks[0]), progress(f"{scene.model}, cfg {scene.cfg:g}, to the exact path")
    few = many[: args.peers[0]]
    goal = converged(lab, scene, args)
    goals = or_none(lambda: lab.drawn(scene, goal, many).latents)
    if goals is None:
        return None
    say("converged")
    found = Reached(scene, {}, {}, {})
    fits = fits_of(lab, scene, counts, args)
    for n in counts:
        hows = [fit[n].how for fit in fits if n in fit]
        mine = or_none(lambda hows=hows: deviation(ours(lab, scene, hows, many), goals)) if hows else None
        if mine is not None:
            found.ours[n] = mine
        say(f"{n} fitted")
    screened = {
        n: or_none(lambda n=n: screen(lab, scene, goal, n, many, args.screen, args.solvers))
        for n in screened_at([*counts, LONG])
    }
    for n in [*counts, LONG]:
        far = partial(stock_deviation, lab, scene, goals, n)
        pairs = promising(n, screened, args.finalists)
        rows = [(pair, one) for pair in pairs if (one := or_none(partial(far, pair, few))) is not None]
        if rows:
            best, _ = min(rows, key=lambda row: float(row[1].mean()))
            whole = or_none(partial(far, best, many))
            if whole is not None:
                found.free[n] = best, whole
            found.solvers[n] = [(str(pair), one) for pair, one in rows]
        say(f"{n} free")
    return found


def stock_deviation(
    lab: FitLab, scene: Scene, goals: Tensor, n: int, pair: Pair, work: Sequence[Task]
) -> Tensor:  # fmt: skip
    how = short_how(lab, scene.model, pair.solver, pair.schedule, n)
    return deviation(lab.drawn(scene, how, work).latents, goals[: len(work)])


def screened_at(counts: Sequence[int]) -> list[int]:
    """Of SCREENED, or all counts where none of these is asked for."""
    return [n for n in SCREENED if min(counts) <= n <= max(counts)] or list(counts)


def promising(n: int, screened: dict[int, list[Pair] | None], most: int) -> list[Pair]:
    """The best pairs with n evaluations, or with the nearest fewer and more ones."""
    there = [m for m, pairs in screened.items() if pairs]
    if not there:
        return []
    around = [n] if n in there else [*[m for m in there if m < n][-1:], *[m for m in there if m > n][:1]]
    found = [(pair.solver, pair.schedule) for m in around for pair in (screened[m] or [])[:most]]
    return [Pair(*one, 0.0) for one in dict.fromkeys(found)]


def ratio(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Of the mean deviations."""
    return jackknifed(lambda kept: float(a[kept].mean() / b[kept].mean()), len(a))


def table(found: Sequence[Reached]) -> Table:
    body = []
    for one in found:
        for n in sorted(one.ours):
            if n not in one.free:
                continue
            best, theirs = one.free[n]
            goal = GOALS[one.scene.model].get(n) if one.scene.cfg == 3 else None
            body.append(
                [one.scene.model, one.scene.cfg, n, str(best), plus_minus(spread(theirs)),
                 plus_minus(spread(one.ours[n])), plus_minus(ratio(one.ours[n], theirs), 2), len(theirs), goal]
            )  # fmt: skip
    columns = ["model", "cfg", "evaluations", "best free run", "its deviation", "fitted", "ratio", "pictures", "goal"]
    note = (
        "Root mean square distance of the latents from the converged ones of the same noise, thousandths: mean ± "
        "standard error over six groups of seeds. Fitted to the exact paths of four prompts from two noises each, as "
        "Attune Fit Sampler does; measured on pictures that no fit saw. The best free run is chosen with these "
        "pictures in hand, of the most promising of all stock schedules x solvers."
    )
    return Table("Deviation from the converged picture", columns, body, note)


def finalists_table(one: Reached) -> Table:
    """The most promising stock pairs on all pictures of the peers."""
    counts = sorted(one.solvers)
    names = dict.fromkeys(name for n in counts for name, _ in one.solvers[n])
    rows = {name: {n: v for n in counts for other, v in one.solvers[n] if other == name} for name in names}
    least = {n: min(float(v.mean()) for _, v in one.solvers[n]) for n in counts}
    said = (
        lambda n, v: None
        if v is None
        else ("**{}**" if float(v.mean()) == least[n] else "{}").format(plus_minus(spread(v)))
    )
    body = [[name, *(said(n, row.get(n)) for n in counts)] for name, row in rows.items()]
    fitted = ["fitted", *(plus_minus(spread(one.ours[n])) if n in one.ours else None for n in counts)]
    body.sort(key=lambda row: (-sum(cell is not None for cell in row), row[0]))
    title = f"{one.scene.model}, cfg {one.scene.cfg:g}: deviation of the most promising stock runs, thousandths"
    return Table(title, ["run", *map(str, counts)], [fitted, *body], "The best stock run of a column is bold.")


def reaches(one: Reached) -> tuple[float, float] | None:
    """With how many evaluations the fitted run reaches the best free run's deviation with LONG."""
    if LONG not in one.free or not one.ours:
        return None
    goal = one.free[LONG][1]
    counts = sorted(one.ours)

    def needed(kept: Tensor) -> float:
        wanted = math.log(float(goal[kept].mean()))
        points = [(n, math.log(float(one.ours[n][kept].mean()))) for n in counts]
        if points[0][1] <= wanted:
            return float(counts[0])
        for (a, high), (b, low) in pairwise(points):
            if low <= wanted < high:
                return a + (b - a) * (high - wanted) / (high - low)
        return math.inf

    if not math.isfinite(needed(torch.arange(len(goal)))):
        return math.inf, math.nan
    return jackknifed(lambda kept: min(needed(kept), float(counts[-1])), len(goal))


def reach_table(found: Sequence[Reached]) -> Table:
    body = []
    for one in found:
        reached = reaches(one)
        if reached is not None:
            said = f"> {max(one.ours)}" if math.isinf(reached[0]) else plus_minus(reached)
            goal = REACH[one.scene.model] if one.scene.cfg == 3 else None
            body.append(
                [
                    one.scene.model,
                    one.scene.cfg,
                    str(one.free[LONG][0]),
                    plus_minus(spread(one.free[LONG][1])),
                    said,
                    goal,
                ]
            )
    columns = ["model", "cfg", f"best free run with {LONG}", "its deviation", "fitted reaches it with", "goal"]
    return Table(
        f"Evaluations that reach the best free run's with {LONG}",
        columns,
        body,
        "Between the counts that were measured by a straight line in the logarithm.",
    )


def bars(found: Sequence[Reached]) -> list[list]:
    rows = []
    for one in found:
        if one.scene.cfg != 3:
            continue
        for n, goal in GOALS[one.scene.model].items():
            if n in one.ours and n in one.free:
                value = ratio(one.ours[n], one.free[n][1])
                rows.append(
                    [
                        f"deviation over the best free run, {one.scene.model}, {n} evaluations",
                        f"<= {goal}",
                        plus_minus(value, 2),
                        value[0] <= goal,
                    ]
                )
        reached = reaches(one)
        if reached is not None:
            goal = REACH[one.scene.model]
            said = f"> {max(one.ours)}" if math.isinf(reached[0]) else plus_minus(reached)
            rows.append(
                [
                    f"evaluations that reach the best free run with {LONG}, {one.scene.model}",
                    f"<= {goal}",
                    said,
                    reached[0] <= goal,
                ]
            )
    return rows
