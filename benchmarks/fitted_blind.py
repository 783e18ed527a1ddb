"""Six fitted steps beside many of the best stock run: would a blind pick tell them apart, by the judge's features?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fitted_lab import CHUNK, FitLab, How, Scene, jackknifed, or_none, plus_minus, spread, work_of
from fitted_path import converged, fits_of, promising, screened_at
from fitted_peers import deviation, screen, short_how
from harness import Task
from results import Table
from schedules import progress

FEW, SAME, STOCK = 6, 6, (16, 20)  # evaluations of the fitted run; of stock ones, as few and many
SHOWN = 6  # pairs of a model on the sheet
PICTURE = "fitted_blind.jpg"


@dataclass
class Pick:
    """One model: perceptual distances to the converged pictures, by run; how each is drawn, chunk by chunk."""

    scene: Scene
    work: list[Task]
    far: dict[str, Tensor]
    hows: dict[str, list[How]]


def best_stock(lab: FitLab, scene: Scene, n: int, args: argparse.Namespace) -> tuple[str, How]:
    """The stock run that is nearest to the converged pictures with n evaluations, of those that promise most."""
    few, goal = work_of(args.peers[0]), converged(lab, scene, args)
    goals = lab.drawn(scene, goal, few).latents
    known = {
        m: screen(lab, scene, goal, m, few, args.screen, args.solvers) for m in screened_at([*args.path_counts, 20])
    }
    hows = {
        str(pair): short_how(lab, scene.model, pair.solver, pair.schedule, n)
        for pair in promising(n, known, args.finalists)
    }
    far = lambda name: float(deviation(lab.drawn(scene, hows[name], few).latents, goals).mean())
    best = min(hows, key=far)
    return best, hows[best]


def measure(lab: FitLab, model: str, args: argparse.Namespace) -> Pick | None:
    return or_none(lambda: picked(lab, Scene(model), args))


def picked(lab: FitLab, scene: Scene, args: argparse.Namespace) -> Pick:
    say, work, goal = progress(f"{scene.model}, blind pick"), work_of(args.pairs), converged(lab, scene, args)
    fits = [fit[FEW].how for fit in fits_of(lab, scene, args.path_counts, args)]
    hows = {f"fitted, {FEW} evaluations": fits}
    for n in dict.fromkeys([SAME, *args.many]):
        name, how = best_stock(lab, scene, n, args)
        hows[f"{name}, {n} evaluations"] = [how]
    far = {}
    for name, several in hows.items():
        parts = [work[i : i + CHUNK] for i in range(0, len(work), CHUNK)]
        turns = [(several[i % len(several)], part) for i, part in enumerate(parts)]
        far[name] = torch.cat([lab.perceptual(scene, how, goal, part) for how, part in turns])
        say(name)
    return Pick(scene, work, far, hows)


def ratio_of(a: Tensor, b: Tensor) -> tuple[float, float]:
    return jackknifed(lambda kept: float(a[kept].mean() / b[kept].mean()), len(a))


def table(found: Sequence[Pick]) -> Table:
    body: list[list] = []
    for one in found:
        (mine, ours), *_ = one.far.items()
        for name, far in one.far.items():
            ratio = ratio_of(ours, far)
            nearer = None if name == mine else f"{100 * float((ours <= far).double().mean()):.0f} %"
            body.append(
                [
                    one.scene.model,
                    name,
                    plus_minus(spread(far), 2),
                    None if name == mine else plus_minus(ratio, 2),
                    nearer,
                    len(far),
                ]
            )
    columns = [
        "model",
        "run",
        "perceptual distance",
        "fitted / this",
        "pairs in which the fitted one is nearer",
        "pictures",
    ]
    note = (
        "The judge's perceptual distance to the converged picture of the same noise, thousandths: mean ± standard "
        "error over groups of seeds. Who sees a pair beside the converged picture picks the nearer."
    )
    return Table("A blind pick by the judge's features", columns, body, note)


def bars(found: Sequence[Pick]) -> list[list]:
    rows = []
    for one in found:
        ours, first = next(iter(one.far.values())), STOCK[0]
        theirs = next((far for name, far in one.far.items() if name.endswith(f", {first} evaluations")), None)
        if theirs is not None:
            ratio = ratio_of(ours, theirs)
            rows.append(
                [
                    f"perceptual distance of {FEW} fitted steps over {first} of the best stock run, {one.scene.model}",
                    "<= 1",
                    plus_minus(ratio, 2),
                    ratio[0] <= 1,
                ]
            )
    return rows


def sheet(lab: FitLab, found: Sequence[Pick], path: Path, side: int = 128) -> None:
    """Pairs side by side, fitted left and the longest stock run right; below each its distance."""
    head, foot = 18, 14
    width, height = 2 * side + 12, side + foot
    canvas = Image.new("RGB", (SHOWN * width, len(found) * (head + 2 * height)), "white")
    pen = ImageDraw.Draw(canvas)
    for line, one in enumerate(found):
        (mine, ours), *_, (other, theirs) = one.far.items()
        top = line * (head + 2 * height)
        pen.text((4, top + 3), f"{one.scene.model}: {mine} left, {other} right", "black", font_size=11)
        for k in range(min(2 * SHOWN, len(one.work))):
            chunk, at = divmod(k, CHUNK)
            part = one.work[chunk * CHUNK : (chunk + 1) * CHUNK]
            x, y = (k % SHOWN) * width, top + head + (k // SHOWN) * height
            for j, (name, far) in enumerate([(mine, ours), (other, theirs)]):
                several = one.hows[name]
                pixels = lab.decoded(one.scene, several[chunk % len(several)], part)[at]
                tile = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
                canvas.paste(tile, (x + j * (side + 2), y))
                pen.text((x + j * (side + 2) + 3, y + side + 1), f"{float(far[k]):.2f}", "black", font_size=10)
    canvas.save(path, quality=88)
