"""What a fit to one picture carries over to, and whether the sign of leaving its range tells where it does not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fitted_fewer import SCHEDULE, Own
from fitted_lab import CHUNK, FitLab, How, Scene, dB, learned_from, or_none, plus_minus, spread, work_of
from fitted_peers import short_how
from harness import Task
from judge import BACKGROUNDS
from results import Table
from schedules import progress

EVALUATIONS = 10
WANTED = 40.0  # dB of latents, what Attune Fast Sampler asks of a short run unless told otherwise
NEAR, FAR_BELOW = 3.0, 6.0  # dB below the usual: no alarm is due, an alarm is due
BATCHES = (2, 4, 8)  # pictures that a fit is made to


@dataclass
class Cell:
    """One way of use: dB of latents and the sign for each fit and picture [fits n], NaN where a fit did not draw; dB of
    pixels, by the fits in turn, and of Euler's latents [n]."""

    name: str
    latents: Tensor
    signs: Tensor
    pixels: Tensor
    euler: Tensor


@dataclass(frozen=True)
class Use:
    """shared: each chunk of pictures shares something with the picture of one fit, which alone draws it."""

    name: str
    scene: Scene
    work: tuple[Task, ...]
    shared: bool = False


def uses_of(scene: Scene, single: Sequence[Task], fresh: Sequence[Task], args: argparse.Namespace) -> list[Use]:
    """The first is the usual one: the set-up that was learned, with other prompts and seeds."""
    plain = tuple(fresh)
    own = [replace(single[i // CHUNK % len(single)], seed=task.seed) for i, task in enumerate(fresh)]
    moved = [replace(one, background=(one.background + 1 + i) % len(BACKGROUNDS)) for i, one in enumerate(own)]
    found = [
        Use("other prompts and seeds", scene, plain),
        Use("the same prompt, other seeds", scene, tuple(own), True),
        Use("the same object on other backgrounds", scene, tuple(moved), True),
        Use("the object alone, without a background", replace(scene, words="object alone"), plain),
        Use("a negative prompt", replace(scene, words="negative"), plain),
    ]
    found += [Use(f"cfg {x:g} times", replace(scene, cfg=x * scene.cfg), plain) for x in args.cfgs]
    found += [Use(f"{side} px", replace(scene, side=side), plain) for side in args.sides]
    found += [Use("a LoRA added", replace(scene, added=("lora",)), plain)] if scene.model == "flow" else []
    found += [Use("a ControlNet added", replace(scene, added=("controlnet",)), plain)] if scene.model == "unet" else []
    return [*found, Use("in fp16", replace(scene, added=("fp16",)), plain)]


def fires(lab: FitLab, sign: Tensor) -> Tensor:
    return sign > lab.host.module("nodes._host.fitted_sampler").FAR


def measure(lab: FitLab, model: str, cfg: float, args: argparse.Namespace) -> tuple[Own, list[Cell], list[list]]:
    """The cells, and rows on batches."""
    own = Own(Scene(model, cfg), args.steps, "euler", SCHEDULE[model])
    say, goal, n = progress(f"{model} carries"), own.goal(lab), min(EVALUATIONS, args.steps - 2)
    fresh, single = work_of(args.carried), learned_from(args.carry_fits)
    hows = [fit[n].how for task in single if n in (fit := lab.learned(own.scene, goal, [task], [n]))]
    cells = []
    for use in uses_of(own.scene, single, fresh, args):
        cell = or_none(lambda use=use: cell_of(lab, own, use, hows, goal, n)) if len(hows) == len(single) else None
        if cell is None and not cells:
            break  # the usual one is what all others are held to
        cells += [] if cell is None else [cell]
        say(use.name)
    rows = []
    for pictures in args.pictures:
        many = learned_from(20 + pictures)[20:]
        fit = lab.learned(own.scene, goal, many, [n]).get(n)
        if fit is not None:
            rows.append(
                [f"fitted on {pictures} pictures", dB(or_none(lambda how=fit.how: beside(lab, own, how, fresh)))]
            )
    if hows:
        for at_once, said in ((1, "one at a time"), (CHUNK, f"{CHUNK} at once")):
            rows.append(
                [f"by the first fit, {said}", dB(or_none(lambda k=at_once: beside(lab, own, hows[0], fresh, k)))]
            )
    return own, cells, rows


def beside(lab: FitLab, own: Own, how: How, work: Sequence[Task], at_once: int = CHUNK) -> Tensor:
    """dB of latents to the long run, drawn so many at once."""
    return lab.fidelity(
        lab.drawn(own.scene, how, work, at_once).latents, lab.drawn(own.scene, own.goal(lab), work).latents
    )


def cell_of(lab: FitLab, own: Own, use: Use, hows: Sequence[How], goal: How, n: int) -> Cell:
    work = list(use.work)
    goals = lab.drawn(use.scene, goal, work).latents
    latents, found = (torch.full((len(hows), len(work)), torch.nan, dtype=torch.float64) for _ in range(2))
    pixels = []
    for i in range(0, len(work), CHUNK):
        part, turn = work[i : i + CHUNK], i // CHUNK % len(hows)
        at = slice(i, i + len(part))
        for f in [turn] if use.shared else range(len(hows)):
            drawn = lab.drawn(use.scene, hows[f], part, 1)
            latents[f, at], found[f, at] = lab.fidelity(drawn.latents, goals[at]), drawn.signs
        pixels.append(lab.pixels(use.scene, hows[turn], goal, part))
    euler = short_how(lab, own.scene.model, "euler", own.schedule, n)
    plain = lab.fidelity(lab.drawn(use.scene, euler, work).latents, goals)
    return Cell(use.name, latents, found, torch.cat(pixels), plain)


@dataclass(frozen=True)
class Count:
    """Of runs: those near their usual fidelity and how many of them alarm; those far below it, or below what is wanted,
    and how many of these are let through."""

    near: int
    alarmed: int
    far: int
    missed: int
    low: int
    let_low: int


def counted(cell: Cell, usual: Tensor, fired: Tensor) -> Count:
    """usual: dB of each fit's own usual run, [fits 1]."""
    near, far, low = cell.latents > usual - NEAR, cell.latents < usual - FAR_BELOW, cell.latents < WANTED
    count = lambda mask: int(mask.sum())
    return Count(count(near), count(near & fired), count(far), count(far & ~fired), count(low), count(low & ~fired))


def usual_of(cells: Sequence[Cell]) -> Tensor:
    return cells[0].latents.mean(1, keepdim=True)


def table(lab: FitLab, own: Own, cells: Sequence[Cell], rows: Sequence[list]) -> Table:
    body: list[list] = []
    for cell in cells:
        fired = fires(lab, cell.signs)
        one = counted(cell, usual_of(cells), fired)
        by_picture, sign = cell.latents.nanmean(0), cell.signs.nanmean(0)
        body.append(
            [cell.name, dB(cell.pixels), dB(by_picture), dB(cell.euler), plus_minus(spread(sign), 2),
             f"{int(fired.sum())} of {int(cell.latents.isfinite().sum())}", f"{one.alarmed} of {one.near}",
             f"{one.missed} of {one.far}", f"{one.let_low} of {one.low}"]
        )  # fmt: skip
    body += [[name, None, said, *[None] * 6] for name, said in rows]
    columns = ["used", "fitted, pixels", "fitted, latents", "Euler, latents", "sign", "alarms"]
    columns += ["false alarms", "missed", "let through below what is wanted"]
    note = (
        "dB to the long run made in the same way: mean ± standard error over groups of seeds (least). "
        f"{len(cells[0].latents) if cells else 0} fits to one picture each, all on the same pictures but where these "
        "share something with one of them. Sign: how far a run goes from what it was fitted to, as Attune Fast Sampler "
        f"reads it; alarms: where it drops the short run. False alarms: of runs within {NEAR:g} dB of the usual (the "
        f"first row's, of the same fit) or above. Missed: of runs more than {FAR_BELOW:g} dB below it. What is wanted: "
        f"{WANTED:g} dB of latents. Euler: as many steps."
    )
    return Table(f"What carries over: {own}, {EVALUATIONS} evaluations", columns, body, note)


def totals(lab: FitLab, found: Sequence[tuple[Own, list[Cell], Any]]) -> Table:
    body = []
    for own, cells, _ in found:
        if not cells:
            continue
        counts = [counted(cell, usual_of(cells), fires(lab, cell.signs)) for cell in cells]
        sums = [sum(values) for values in zip(*map(astuple, counts), strict=True)]
        body.append([str(own), *(share(sums[i + 1], sums[i]) for i in (0, 2, 4))])
    columns = ["long run", "false alarms", "missed", "let through below what is wanted"]
    return Table("The sign of leaving the fitted range, in all uses", columns, body)


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")
