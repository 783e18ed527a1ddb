"""Fitted runs where the right answer is known: exact denoisers in a network's place, beside every stock pair."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import _pack  # noqa: F401
import oracles
from exact import STOCK, TITLES, analytic_model, field, levels, mixture, sample, start
from fitted_lab import FitLab, How, code_of_fits, keep, or_none, plus_minus
from fitted_peers import SEED
from harness import last
from metrics import jackknife
from pack.kernels.fitted_sampler import prove, solve
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import Trajectory
from published import fit_olss, search_plan, solve_olss, solve_plan
from results import Table
from schedules import progress

GOAL = 0.40  # of the best free run's error, geometric mean
FREE = {
    "ve": [*STOCK, "linear_quadratic", "core AYS", "core GITS"],
    "flow": [*STOCK, "linear_quadratic", "core OptimalSteps"],
}
GROUPS = 6
SUBSTEPS = 128  # levels of the exact path, each with four steps of Heun's method
RECORDED = 64  # of these that are fitted to


TARGETS: dict[str, tuple[Callable, int]] = {  # and the side of a picture of theirs
    "two bumps on a line": (mixture, 16),
    "6 x 6 bumps in the plane": (lambda space: oracles.mixture_2d(NoiseSpace(space)), 24),
    "24 contents in 32 dimensions": (lambda space: oracles.mixture_latent(NoiseSpace(space)), 48),
    "1/f field": (field, 16),
}


@dataclass
class Problem:
    """A target as the host's MODEL; noises [groups 1 side side] to measure on, and others to fit to."""

    name: str
    space: str
    target: Any
    model: Any
    noise: Tensor
    learned: Tensor

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Pictures as rows of the target's dimensions."""
        rows = self.rows(x)
        return self.target.denoise(rows, sigma.double().reshape(-1)[:1].expand(len(rows))).reshape(x.shape)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.target.means.shape[1]) if hasattr(self.target, "means") else x


def problem(name: str, space: str) -> Problem:
    make, side = TARGETS[name]
    target = make(space)
    draw = lambda seed: torch.randn(GROUPS, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return Problem(name, space, target, analytic_model(target, 1), draw(1), draw(2))


def exact(one: Problem, x: Tensor, first: float, most: int) -> Trajectory:
    """The exact path from x at the level `first`."""
    fine = oracles.fine_levels(one.target.space, most)
    fine = torch.cat([torch.tensor([first], dtype=torch.float64), fine[fine < first * (1 - 1e-6)]])
    denoiser = type("Target", (), {"denoise": staticmethod(one.denoise), "space": one.target.space})
    return oracles.path(denoiser, x.double(), fine)


def errors(end: Tensor, goal: Tensor) -> list[float]:
    """Root mean square distance of each group's."""
    found = (end.double() - goal).square().flatten(1).mean(1).sqrt()
    return found.nan_to_num(math.inf, math.inf).tolist()


def measured(lab: FitLab, name: str, space: str, steps: int, trials: int, solvers: list[str]) -> dict[str, list[float]]:
    """Row -> the error of each group; stock pairs by "solver, schedule"."""
    one = problem(name, space)
    facts = [name, space, steps, list(one.noise.shape), SUBSTEPS]
    stock = kept(lab, "exact stock", [*facts, solvers], lambda: stock_rows(lab, one, steps, solvers))
    return stock | kept(
        lab, "exact", [*facts, trials, best_free(stock), code_of_fits()],
        lambda: fitted_rows(lab, one, steps, trials, best_free(stock).partition(", ")[2]),
    )  # fmt: skip


def kept(lab: FitLab, what: str, facts: list, work: Callable[[], dict]) -> dict:
    path = lab.kept(what, facts, [], ".json")
    if not path.exists():
        lab.must_be_drawn()
        keep(path, work())
    return json.loads(path.read_text("utf-8"))


def stock_rows(lab: FitLab, one: Problem, steps: int, solvers: list[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    goals: dict[tuple, Tensor] = {}
    for solver in solvers:
        for schedule in FREE[one.space]:
            sigmas = levels(lab.host, one.model, schedule, (steps + 1) // 2 if solver == "heun" else steps)
            begin, first = start(one.model, sigmas, one.noise), float(sigmas[0].double())
            key = round(first, 6), round(float(begin.std()), 6)
            if key not in goals:
                goals[key] = exact(one, begin, first, SUBSTEPS).end
            found[f"{solver}, {schedule}"] = errors(run_stock(lab, one, solver, sigmas), goals[key])
    return found


def fitted_rows(lab: FitLab, one: Problem, steps: int, trials: int, schedule: str) -> dict[str, list[float]]:
    """What is fitted to other noises; OLSS on the levels of a schedule."""
    known = [levels(lab.host, one.model, name, steps).double() for name in FREE[one.space]]
    plain = levels(lab.host, one.model, schedule, steps)
    begin, first = start(one.model, plain, one.noise), float(plain[0].double())
    goal = exact(one, begin, first, SUBSTEPS).end
    path = exact(one, start(one.model, plain, one.learned), first, RECORDED)
    paths = [Trajectory(path.sigmas, path.states[:, [k]], path.slopes[:, [k]]) for k in range(GROUPS)]
    none = lambda _: {"none": lambda _: paths[0].states[0]}
    given = [*paths, paths[0]], 1, [steps], none, one.target.space  # what it proves is measured here instead
    (proof,) = last(prove(lambda _: one.denoise, *given))
    olss = fit_olss(one.denoise, plain.double(), path)
    known = [sigmas for sigmas in known if len(sigmas) == steps + 1 and abs(float(sigmas[0]) - first) < 1e-6 * first]

    def error(plan: Any) -> float:
        at, kinds = plan
        end = solve_plan(one.denoise, path.states[0], known[at], kinds, one.target.space)
        return float((end - path.end).square().mean())

    at, kinds = search_plan(error, steps, len(known), trials, torch.Generator().manual_seed(SEED))
    ends = [
        solve(one.denoise, begin, proof.run), solve_olss(one.denoise, begin, olss),
        solve_plan(one.denoise, begin, known[at], kinds, one.target.space),
    ]  # fmt: skip
    return {name: errors(end, goal) for name, end in zip(OWN, ends, strict=True)}


def run_stock(lab: FitLab, one: Problem, solver: str, sigmas: Tensor) -> Tensor:
    return sample(lab.host, one.model, lab.solver(How(solver, ())), sigmas, one.noise)


def measure(lab: FitLab, args: argparse.Namespace) -> list[dict]:
    found = []
    for space in ("ve", "flow"):
        for name in args.targets:
            for steps in args.exact_steps:
                progress("exact targets")(f"{space} {name} {steps}")
                rows = or_none(lambda s=space, n=name, m=steps: measured(lab, n, s, m, args.trials, list(args.solvers)))
                if rows is not None:
                    found.append({"space": space, "target": name, "steps": steps, "rows": rows})
    return found


OWN = ("fitted", "OLSS", "searched plan (USF)")


def best_free(rows: dict[str, list[float]]) -> str:
    return min((name for name in rows if name not in OWN), key=lambda name: sum(rows[name]))


def ratio(rows: dict[str, list[float]], name: str) -> tuple[float, float]:
    """Of the mean errors over the groups, to the best free run's."""
    a, b = (torch.tensor(rows[one], dtype=torch.float64) for one in (name, best_free(rows)))
    return jackknife(lambda kept: float(a[kept].mean() / b[kept].mean()), len(a), len(a))


def geometric(found: list[dict], steps: int, name: str) -> float:
    values = [ratio(one["rows"], name)[0] for one in found if one["steps"] == steps]
    return math.exp(sum(math.log(value) for value in values) / len(values))


def table(found: list[dict]) -> Table:
    body: list[list] = []
    for one in found:
        best = best_free(one["rows"])
        cells = [plus_minus(ratio(one["rows"], name), 2) for name in OWN]
        far = 1000 * sum(one["rows"][best]) / len(one["rows"][best])
        body.append([one["target"], TITLES[one["space"]], one["steps"], best, f"{far:.3g}", *cells])
    for steps in dict.fromkeys(one["steps"] for one in found):
        body.append(
            [
                "**geometric mean**",
                None,
                steps,
                None,
                None,
                *(f"**{geometric(found, steps, name):.2f}**" for name in OWN),
            ]
        )
    columns = ["target", "noise", "evaluations", "best free run", "its error", "fitted", "OLSS", "searched plan (USF)"]
    note = (
        "Root mean square distance to where the exact path of the same noise ends, thousandths, and the others' as a "
        "share of it, with the standard error over six groups of noises. The best free run is chosen of every stock "
        "solver on every stock schedule with the measured errors in hand; everything fitted saw other noises."
    )
    return Table("Exact targets: error as a share of the best free run's", columns, body, note)


def bars(found: list[dict]) -> list[list]:
    if not any(one["steps"] == 8 for one in found):
        return []
    value = geometric(found, 8, "fitted")
    return [
        [
            "exact targets, geometric mean over the best free run, 8 evaluations",
            f"<= {GOAL}",
            f"{value:.2f}",
            value <= GOAL,
        ]
    ]
