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
from results import DOCS, Table, fill, markdown, record
from schedules import progress

RUNS = {"flow:euler:3": (8, 10), "unet:euler:7": (12, 15), "flow:euler:5": (12, 15), "unet:dpmpp_2m:3": (8, 10)}
STEPS = {"euler": 50, "dpmpp_2m": 20}
MANY, FITS = 8, 2  # pictures learned from at once; fits to one picture each
NODE, ITSELF = "as the node does", "the bound: fitted to each picture itself"
FORMAT = 1  # raise it when a way of fitting changes
WIDEST, FINEST = 0.1, 0.002  # of the warp's numbers, in the search


class Ways:
    """Runs of n steps fitted to a recorded path."""

    def __init__(self, lab: FitLab):
        self.kernel = lab.host.module("kernels.fitted_sampler")
        self.resample = lab.host.module("kernels.schedules").resample_theta
        self._last = lab.host.module("nodes._host.session").last

    def of(self, name: str, run: Any, path: Any, space: Any, n: int) -> Any:
        """The fitted run."""
        kernel, paper, halves = self.kernel, self.kernel.OnPaper(path), self.kernel.half(path.states[0])
        own = self.own(path, space, n)

        def over(levels: Tensor, history: int = kernel.HISTORY) -> Any:
            return self._last(kernel.fit_steps(run._denoise_over(levels), levels, path, halves, history))[0]

        def nearest(part: Tensor | None) -> Any:
            return self._last(kernel._nearest(run._denoise_over, path, n, space, paper, part))[0]

        if name == "polished":
            found = nearest(None)
            return self._last(kernel.polish(run._denoise_over(torch.tensor(found.sigmas)), found, path))
        if name.startswith("ridge"):
            with self._ridge(float(name.split()[1])):
                return nearest(halves)
        if name == "history":
            return over(own, 3)
        if name == "paper":
            return over(kernel.search_levels(paper, own, lowest(path), space))
        if name == "warp":
            return over(warped(path, n, paper))
        return nearest(None if name == "whole" else halves)

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


def fitted(lab: FitLab, ways: Ways, own: Own, name: str, part: Sequence[Task], n: int) -> How:
    """A run fitted to these pictures at once."""
    goal = own.goal(lab)
    kept = lab.kept("limits", [name, n, astuple(own.scene), astuple(goal), code_of_fits(), FORMAT], part, ".json")
    if not kept.exists():
        lab.taught(own.scene, goal, part, lambda *given: keep(kept, fields_of(ways.of(name, *given, n))))
    run = tuple((key, frozen(one)) for key, one in json.loads(kept.read_text("utf-8")))
    return Fit(run, 0.0).how


def itself(lab: FitLab, ways: Ways, own: Own, n: int, work: Sequence[Task]) -> Seen:
    """Each picture by the run that was fitted to it."""
    goal = own.goal(lab)
    each = [seen(lab, own.scene, [fitted(lab, ways, own, "whole", [task], n)], goal, [task]) for task in work]
    return Seen(n, torch.cat([one.pixels for one in each]), torch.cat([one.latents for one in each]))


def measure(lab: FitLab, name: str, counts: Sequence[int], pictures: int) -> list[list]:
    """The rows of one long run."""
    model, solver, cfg = name.split(":")
    schedule = (SCHEDULE if solver == "euler" else OF_2M)[model]
    own, ways, work = Own(Scene(model, float(cfg)), STEPS[solver], solver, schedule), Ways(lab), work_of(pictures)
    say, goal, single = progress(str(own)), own.goal(lab), learned_from(max(MANY, FITS))
    lines: dict[str, Callable[[int], Seen]] = {}
    for said, way in SINGLE.items():
        hows = lambda n, way=way: [fitted(lab, ways, own, way, [task], n) for task in single[:FITS]]
        lines[said] = lambda n, hows=hows: seen(lab, own.scene, hows(n), goal, work)
    for said, way in AT_ONCE.items():
        how = lambda n, way=way: [fitted(lab, ways, own, way, single[:MANY], n)]
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
