"""What keeps a fitted run from its goals: the numbers of a step, where the levels lie, or the picture that was shown?

python dev.py bench fitted_limits [--runs unet:euler:7 …] [--pictures 8]

For each long run whose goal Attune Fast Sampler misses, other ways to fit and one bound, on the same pictures:
- as the node does: levels of the long run or those found on paper, fitted to every second block of one picture;
- the same fitted to the whole picture; with a ridge ten times as large, and a tenth; with the three last answers;
- always the levels found on paper; levels of a smooth warp of the long run's own (two numbers, the search on paper);
- fitted to eight pictures at once, and these polished by Gauss-Newton on the end;
- the bound: each picture by a run that was fitted to that picture itself.
What the bound reaches is within the step's form; what lies between it and the node is lost from one picture to another.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_process import Host
from fitted_fewer import FAITHFUL, OF_2M, SCHEDULE, Own, goal_of, times
from fitted_lab import (
    Fit,
    FitLab,
    How,
    Scene,
    code_of_fits,
    dB,
    fields_of,
    frozen,
    keep,
    learned_from,
    work_of,
)
from fitted_peers import Seen, seen
from harness import CACHE, Task
from metrics import psnr
from results import DOCS, Table, fill, markdown, record
from schedules import progress

RUNS = {"flow:euler:3": (8, 10), "unet:euler:7": (12, 15), "flow:euler:5": (12, 15), "unet:dpmpp_2m:3": (8, 10)}
STEPS = {"euler": 50, "dpmpp_2m": 20}
MANY, FITS = 8, 2  # pictures learned from at once; fits to one picture each
NODE, ITSELF = "as the node does", "the bound: fitted to each picture itself"
WIDEST, FINEST = 0.1, 0.002  # of the warp's numbers, in the search


class Ways:
    """Runs of n steps fitted to a recorded path."""

    def __init__(self, lab: FitLab):
        self.kernel = lab.host.module("kernels.fitted_sampler")
        self.resample = lab.host.module("kernels.schedules").resample_theta
        self._last = lab.host.module("nodes._host.session").last

    def of(self, name: str, run: Any, path: Any, space: Any, n: int) -> tuple[Any, Tensor]:
        """The fitted run and where it ends on the pictures of the path."""
        kernel, paper = self.kernel, self.kernel.OnPaper(path)
        own = self.own(path, space, n)
        fit = lambda levels, part, history=kernel.HISTORY: self._last(
            kernel.fit_steps(run._denoise_over(levels), levels, path, part, history)
        )
        halves = kernel.half(path.states[0])
        nearest = lambda part: self._last(kernel._nearest(run._denoise_over, path, n, space, paper, part))
        if name == "polished":
            found, *_ = nearest(None)
            polished = self._last(kernel.polish(run._denoise_over(torch.tensor(found.sigmas)), found, path))
            return polished, path.end
        if name.startswith("ridge"):
            with self._ridge(float(name.split()[1])):
                found, _, end = nearest(halves)
            return found, end
        if name == "history":
            return fit(own, halves, 3)
        if name == "paper":
            return fit(self.kernel.search_levels(paper, own, lowest(path), space), halves)
        if name == "warp":
            return fit(warped(path, n, paper), halves)
        found, _, end = nearest(None if name == "whole" else halves)
        return found, end

    def own(self, path: Any, space: Any, n: int) -> Tensor:
        """The long run's levels, spread over fewer steps."""
        levels = self.resample(path.sigmas.double(), n, space)
        levels[0], levels[-1] = path.sigmas[0], path.sigmas[-1]
        return levels

    @contextmanager
    def _ridge(self, value: float) -> Iterator[None]:
        before, self.kernel.RIDGE = self.kernel.RIDGE, value
        try:
            yield
        finally:
            self.kernel.RIDGE = before


SINGLE = {
    NODE: "node",
    "fitted to the whole picture": "whole",
    "a ridge of 1": "ridge 1",
    "a ridge of 0.01": "ridge 0.01",
    "three earlier answers, levels of the long run": "history",
    "levels found on paper, always": "paper",
    "levels of a smooth warp": "warp",
}
AT_ONCE = {f"fitted to {MANY} pictures": "whole", f"fitted to {MANY} pictures and polished": "polished"}


def lowest(path: Any) -> float:
    return min(level for level in path.sigmas.tolist() if level > 0)


def warped(path: Any, n: int, paper: Any) -> Tensor:
    """Of levels at the places u + a sin(pi u) + b sin(2 pi u) of the long run's, u = 0 ... 1, those that cost least on
    paper."""
    known = path.sigmas.double()
    steps = len(known) - 1
    places = torch.linspace(0, 1, n + 1, dtype=torch.float64)

    def levels(by: Sequence[float]) -> Tensor | None:
        moved = places + sum(share * torch.sin((k + 1) * math.pi * places) for k, share in enumerate(by))
        if not (moved[1:] > moved[:-1]).all():
            return None
        i = (moved * steps).floor().clamp(0, steps - 1).long()
        found = torch.lerp(known[i], known[i + 1], moved * steps - i)
        found[0], found[-1] = known[0], known[-1]
        return found

    best, move = [0.0, 0.0], WIDEST
    found = levels(best)
    least = paper.cost(found)
    while move > FINEST:
        gained = False
        for k in (0, 1):
            for way in (move, -move):
                moved = [one + way * (j == k) for j, one in enumerate(best)]
                tried = levels(moved)
                if tried is not None and (cost := paper.cost(tried)) < (1 - 1e-3) * least:
                    best, found, least, gained = moved, tried, cost, True
                    break
        move = move if gained else move / 2
    return found


def fitted(lab: FitLab, ways: Ways, own: Own, name: str, part: Sequence[Task], n: int) -> tuple[How, Path]:
    """A run fitted to these pictures at once, and where its latents of these are kept."""
    goal = own.goal(lab)
    facts = [name, n, astuple(own.scene), astuple(goal), code_of_fits(), Path(__file__).read_text("utf-8")]
    kept, ends = (lab.kept("limits", facts, part, end) for end in (".json", ".pt"))
    if not kept.exists():

        def work(run: Any, path: Any, space: Any) -> None:
            found, end = ways.of(name, run, path, space, n)
            torch.save(end.float(), ends)
            keep(kept, fields_of(found))

        lab.taught(own.scene, goal, part, work)
    run = tuple((key, frozen(one)) for key, one in json.loads(kept.read_text("utf-8")))
    return Fit(run, 0.0).how, ends


def itself(lab: FitLab, ways: Ways, own: Own, n: int, work: Sequence[Task]) -> Seen:
    """Each picture by the run that was fitted to it."""
    ends = [fitted(lab, ways, own, "whole", [task], n)[1] for task in work]
    latents = torch.cat([torch.load(path, weights_only=True) for path in ends])
    goal = lab.drawn(own.scene, own.goal(lab), work).latents
    shown = partial(lab.pictures, own.scene.model)
    return Seen(n, psnr(shown(latents), shown(goal)).double(), lab.fidelity(latents, goal))


def measure(lab: FitLab, name: str, counts: Sequence[int], pictures: int) -> list[list]:
    """The rows of one long run."""
    model, solver, cfg = name.split(":")
    schedule = (SCHEDULE if solver == "euler" else OF_2M)[model]
    own, ways, work = Own(Scene(model, float(cfg)), STEPS[solver], solver, schedule), Ways(lab), work_of(pictures)
    say, goal, single = progress(str(own)), own.goal(lab), learned_from(max(MANY, FITS))
    lines: dict[str, Callable[[int], Seen]] = {}
    for said, way in SINGLE.items():
        hows = lambda n, way=way: [fitted(lab, ways, own, way, [task], n)[0] for task in single[:FITS]]
        lines[said] = lambda n, hows=hows: seen(lab, own.scene, hows(n), goal, work)
    for said, way in AT_ONCE.items():
        how = lambda n, way=way: [fitted(lab, ways, own, way, single[:MANY], n)[0]]
        lines[said] = lambda n, how=how: seen(lab, own.scene, how(n), goal, work)
    lines[ITSELF] = lambda n: itself(lab, ways, own, n, work)
    rows = []
    for said, line in lines.items():
        found = {n: line(n) for n in counts}
        few, more = found.values()
        rows.append([str(own), said, *times(own, found), goal_of(own), dB(few.pixels), dB(more.pixels)])
        say(said)
    return rows


def table(rows: Sequence[list], pictures: int) -> Table:
    columns = ["long run", "fitted", f"times fewer at {FAITHFUL:g} dB", "goal", "dB with few", "dB with more"]
    counts = "; ".join(f"{name.replace(':', ' ')} {few} and {more}" for name, (few, more) in RUNS.items())
    note = (
        f"dB of pixels: mean ± standard error (least), on {pictures} pictures that only the bound's fits saw; fits to "
        f"one picture: {FITS}, in turn. Evaluations, few and more: {counts}."
    )
    return Table("What keeps a fitted run from its goals", columns, list(rows), note)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--pictures", type=int, default=8, help="multiples of 4")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = FitLab(Host(Path(folder)), args.cache)
        rows = [row for name in args.runs for row in measure(lab, name, RUNS[name], args.pictures)]
    found = table(rows, args.pictures)
    notes = [" ".join(__doc__.split("\n\n")[2].split())]
    record("fitted_limits", "What keeps a fitted run from its goals", [found], began, (), notes, args.out)
    fill(args.out / "fitted_sampler.md", "fitted_limits", [found])
    print("\n" + markdown(found))


if __name__ == "__main__":
    main()
