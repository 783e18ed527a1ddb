"""How many times fewer evaluations reach the user's own long run, by what was fitted to it and by all else."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fitted_lab import (
    Fit,
    FitLab,
    How,
    Scene,
    dB,
    jackknifed,
    learned_from,
    or_none,
    plus_minus,
    spread,
    work_of,
)
from fitted_peers import (
    Pair,
    Seen,
    best_forecast,
    best_of_each,
    cached_hows,
    forecast_how,
    olss_how,
    plan_how,
    screen,
    seen,
    short_how,
)
from fitted_steps import CHEBYSHEV, TAYLOR
from harness import Task
from results import Table
from schedules import progress

FAITHFUL = 45.0  # dB of the pictures, from which they look the same
HOPELESS = 36.0  # dB of what is not measured with still more evaluations
SCHEDULE = {"unet": "karras", "flow": "beta"}
OF_2M = {"unet": "karras", "flow": "simple"}
GOALS = {("euler", 3.0): 5.5, ("euler", 5.0): 3.8, ("euler", 7.0): 3.8, ("dpmpp_2m", 3.0): 2.2}
SCREENED_AT = 10  # evaluations with which all stock pairs are tried
OF_OLSS = 2  # pictures, each for a fit of its own

Line = dict[int, "Seen | None"]  # by the evaluations that were asked for


@dataclass(frozen=True)
class Own:
    """A user's own long run."""

    scene: Scene
    steps: int
    solver: str
    schedule: str

    def goal(self, lab: FitLab) -> How:
        return How(self.solver, lab.levels(self.scene.model, self.schedule, self.steps))

    def __str__(self) -> str:
        return f"{self.scene.model}, {self.steps} steps of {self.solver} ({self.schedule}), cfg {self.scene.cfg:g}"


@dataclass
class Block:
    """One long run: its pairs by error, the table of its short runs, and the rows of times fewer evaluations."""

    own: Own
    pairs: list[Pair]
    table: Table
    fewer: list[list]
    line: Line


def measure(
    lab: FitLab, own: Own, counts: Sequence[int], pictures: tuple[int, int], args: argparse.Namespace, peers: str
) -> Block:
    """The fits, and what else there is, against one long run. pictures: of ours and of the rest. peers: "all", "best",
    or "own" for the solver of the long run alone."""
    scene, goal, say = own.scene, own.goal(lab), progress(str(own))
    many, single = work_of(pictures[0]), learned_from(args.fits)
    few = many[: pictures[1]]
    fits = [lab.learned(scene, goal, [task], counts) for task in single]
    line: Line = {}
    for n in counts:
        hows = [fit[n].how for fit in fits if n in fit]
        line[n] = or_none(lambda hows=hows: seen(lab, scene, hows, goal, many)) if len(hows) == len(fits) else None
        say(f"{n} evaluations")
    same = {n: one and one.head(len(few)) for n, one in line.items()}
    row = lambda name, cell: [name, *map(cell, counts)]
    body = [
        row("**fitted**, pixels", lambda n: dB(line[n] and line[n].pixels)),
        row("fitted, latents", lambda n: dB(line[n] and line[n].latents)),
        row("proved by the fits themselves, latents", lambda n: proved(fits, n)),
        row("fitted, on the pictures of the rows below", lambda n: dB(same[n] and same[n].pixels)),
    ]
    fewer = [
        ["**fitted on one picture**", *times(own, line), dB_at(line, SCREENED_AT), len(many)],
        ["the same, on the pictures of the rows below", *times(own, same), dB_at(same, SCREENED_AT), len(few)],
    ]
    pairs = or_none(lambda: screen(lab, scene, goal, min(SCREENED_AT, own.steps // 2), many, args.screen, args.solvers))
    rows = []
    for name, found, drawn in lines(lab, own, pairs or [], few, single, counts, args, peers):
        body.append(row(name, lambda n, found=found: cell_at(found, n, counts)))
        rows.append([name, *times(own, found), dB_at(found, SCREENED_AT), drawn])
        say(name)
    fewer += sorted(rows, key=lambda row: -order(row))
    note = (
        f"dB of pixels: mean ± standard error over six groups of seeds (least). Fitted: {args.fits} fits, each to one "
        f"picture, in turn for the groups, on {len(many)} pictures of other prompts and seeds; the rest on the first "
        f"{len(few)} of these at most."
    )
    return Block(
        own, pairs or [], Table(f"dB to {own}, by evaluations", ["run", *map(str, counts)], body, note), fewer, line
    )


def proved(fits: Sequence[dict[int, Fit]], n: int) -> str | None:
    return " / ".join(f"{fit[n].proved:.1f}" for fit in fits if n in fit) or None


def lines(
    lab: FitLab, own: Own, pairs: Sequence[Pair], few: Sequence[Task], single: Sequence[Task], counts: Sequence[int],
    args: argparse.Namespace, peers: str,
) -> Iterator[tuple[str, Line, int]]:  # fmt: skip
    """Names, measurements, pictures."""
    scene, goal, model = own.scene, own.goal(lab), own.scene.model

    def line_of(how: Callable[[int], How | list[How]], at: Sequence[int], more: Sequence[int] = ()) -> Line:
        def one(n: int) -> Seen | None:
            def work() -> Seen:
                hows = how(n)
                return seen(lab, scene, hows if isinstance(hows, list) else [hows], goal, few)

            return or_none(work)

        found = {n: one(n) for n in at}
        for n in more:
            last = list(found.values())[-1]
            if last is not None and HOPELESS <= float(last.pixels.mean()) < FAITHFUL and n < own.steps:
                found[n] = one(n)
        return found

    stock = lambda solver, schedule: lambda n: short_how(lab, model, solver, schedule, n)
    shown = {f"{one}, {own.schedule}": (one, own.schedule) for one in dict.fromkeys([own.solver, "euler"])}
    if peers != "own":
        best = best_of_each(pairs)
        shown |= {str(one): (one.solver, one.schedule) for one in best[: None if peers == "all" else args.finalists]}
    for name, (solver, schedule) in shown.items():
        at = [n for n in (*counts, 15, 18) if n < own.steps] if peers == "own" else counts
        yield name, line_of(stock(solver, schedule), sorted(set(at)), args.more), len(few)
    if peers == "own":
        return
    for kind in (TAYLOR, CHEBYSHEV):
        chosen = or_none(lambda kind=kind: best_forecast(lab, scene, goal, kind, SCREENED_AT, few, args.screen))
        if chosen is not None:
            name = f"{kind} of the {chosen[0]}, {chosen[1]}"
            yield (
                name,
                line_of(lambda n, kind=kind, chosen=chosen: forecast_how(goal, kind, chosen, n), counts, args.more),
                len(few),
            )
    if peers != "all":
        return
    olss = lambda n: [
        olss_how(lab, scene, goal, [task], lab.levels(model, own.schedule, n)) for task in single[:OF_OLSS]
    ]  # fmt: skip
    yield f"OLSS, {own.schedule}", line_of(olss, counts), len(few)
    schedules = list(dict.fromkeys(pair.schedule for pair in pairs))[:OF_OLSS]
    if schedules:
        plan = lambda n: plan_how(lab, scene, goal, single[:OF_OLSS], schedules, n, args.trials)
        yield "searched plan (USF)", line_of(plan, args.plans), len(few)
    if args.caches:
        some = few[: args.cached]
        for name, hows in (or_none(lambda: cached_hows(lab, scene, goal, own.schedule)) or {}).items():
            found = [or_none(lambda how=how: seen(lab, scene, [how], goal, some)) for how in hows]
            yield name, {round(one.calls): one for one in found if one is not None}, len(some)


def times(own: Own, line: Line) -> list[str | None]:
    """[How many times fewer evaluations reach FAITHFUL, with the standard error over groups of seeds]."""
    points = sorted({one.calls: one for one in line.values() if one is not None}.items())
    if not points:
        return [None]
    first, last = points[0][0], points[-1][0]

    def needed(kept: Tensor) -> float:
        found = [(calls, float(one.pixels[kept].mean())) for calls, one in points]
        if found[0][1] >= FAITHFUL:
            return float(first)
        for (a, low), (b, high) in pairwise(found):
            if low < FAITHFUL <= high:
                return a + (b - a) * (FAITHFUL - low) / (high - low)
        return math.inf

    n = len(points[0][1].pixels)
    found = needed(torch.arange(n))
    if found == math.inf:
        return [f"< {own.steps / last:.2f}"]
    if found == first:
        return [f"> {own.steps / first:.2f}"]
    return [plus_minus(jackknifed(lambda kept: own.steps / min(needed(kept), last), n), 2)]


def order(row: list) -> float:
    """Rows of times fewer evaluations by what they say; what was not reached comes last."""
    said = row[1] or "< 0"
    return -1 / (1 + float(said[2:])) if said.startswith("<") else float(said.removeprefix("> ").split()[0])


def dB_at(line: Line, n: int) -> str | None:
    one = line.get(n)
    return None if one is None else plus_minus(spread(one.pixels))


def cell_at(line: Line, n: int, counts: Sequence[int]) -> str | None:
    """The measurement nearest to n evaluations, which are named where they are others; what never takes as few stands
    in the last column."""
    there = [one for one in line.values() if one is not None]
    if not there:
        return None
    near = line.get(n) or min(there, key=lambda one: abs(one.calls - n))
    if abs(near.calls - n) > 2 and n not in line and n < max(counts):
        return None
    return f"{dB(near.pixels)}" + ("" if near.calls == n else f", {near.calls:.3g} calls")


def fewer_table(blocks: Sequence[Block]) -> Table:
    body = [[str(b.own), *row, goal_of(b.own) if row[0].startswith("**") else None] for b in blocks for row in b.fewer]
    columns = [
        "long run",
        "run",
        f"times fewer at {FAITHFUL:g} dB",
        f"dB at {SCREENED_AT} evaluations",
        "pictures",
        "goal",
    ]
    note = (
        f"Evaluations of the long run over those that reach {FAITHFUL:g} dB of the pictures in the mean, between the "
        "counts that were measured by a straight line. Stock solvers on the best of the host's schedules, which is "
        "chosen among all on a few pictures; a reused feature costs what its blocks do. '<': not reached with the most "
        "evaluations measured; '>': by the fewest already."
    )
    return Table("Times fewer evaluations", columns, body, note)


def goal_of(own: Own) -> float | None:
    return GOALS.get((own.solver, own.scene.cfg))


def pairs_table(blocks: Sequence[Block], pictures: int) -> Table:
    """Every stock solver on its best stock schedule, for each long run."""
    there = [block for block in blocks if block.pairs]
    solvers = list(dict.fromkeys(pair.solver for block in there for pair in block.pairs))
    best = [{pair.solver: pair for pair in best_of_each(block.pairs)} for block in there]
    cell = lambda found, solver: f"{found[solver].error:.1f} ({found[solver].schedule})" if solver in found else None
    body = [[solver, *(cell(found, solver) for found in best)] for solver in solvers]
    note = (
        f"Root mean square distance of the latents from the long run's, thousandths, with {SCREENED_AT} evaluations "
        f"(heun: one less) on {pictures} pictures, on the best of the host's schedules and tables."
    )
    return Table(
        "Every stock solver beside the long runs", ["solver", *(str(block.own) for block in there)], body, note
    )


def bars(blocks: Sequence[Block]) -> list[list]:
    """[figure, goal, found, whether it is met]."""
    found = []
    for block in blocks:
        goal, said = goal_of(block.own), times(block.own, block.line)[0]
        if goal is not None and said is not None:
            value = float(said.removeprefix("<").removeprefix(">").split()[0])
            found.append([f"times fewer, {block.own}", f">= {goal}", said, value >= goal and not said.startswith("<")])
    return found
