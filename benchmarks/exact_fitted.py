"""Fitted schedules and timesteps where the right answer is known: no network, the host's own samplers.

python dev.py bench exact_fitted [--spaces ve flow] [--solvers euler dpmpp_2m uni_pc] [--steps 5 6 8 10 20]

The targets of `exact`: a mixture of two Gaussians on a line and a Gaussian field with a 1/f spectrum. Against the best
of all free schedules, chosen with the measured errors in hand: the bound of Align Your Steps (KLUB), minimised till its
levels rest, and stopped early from `normal` by the error of a run; the published loss of the timestep aligner,
sequential and parallel, and ours, on the levels of `beta`; what Attune Tune Schedule finds with its smallest preset.
Fitted and measured on other noises. The error is the root mean square distance to where the exact probability-flow ODE
takes the same noise: on the mixture with the standard error over disjoint groups of seeds, on the field without
samples.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _pack  # noqa: F401
from comfy_process import Host
from exact import (
    GROUPS,
    SCHEDULES,
    SIDE,
    TITLES,
    AnalyticNetwork,
    analytic_model,
    cdf,
    field,
    field_scores,
    levels,
    mixture,
    mixture_noise,
    quantiles,
    sample,
    start,
)
from harness import last
from pack.models.calibration import Calibration, CondLevels
from published import TOP_OF_FLOW, align_published, klub_optimal_gaussian, minimise_klub, ve_denoiser
from results import DOCS, Table, markdown, record

TARGETS = {"mixture": mixture, "1/f field": field}
BASE = "beta"
SWEEPS, EARLY_SWEEPS = 12, 6
SEED = 1000  # of the noises to fit on
FREE, BY_NAME = "best free", "its name"
ROWS = ["KLUB minimised", "KLUB stopped early", f"{BASE}, published aligner, sequential",
        f"{BASE}, published aligner, parallel", f"{BASE}, aligned", "tuned levels", "tuned"]  # fmt: skip
EFFORT = {"preset": "mini", "budget_minutes": 0.0, "coefficients": False}  # of a fit


class Problem:
    """One target in the host: its MODEL, and the error of a run against the exact answer, per group of seeds."""

    def __init__(self, host: Host, name: str, space: str, samples: int):
        self.host, self.name, self.target = host, name, TARGETS[name](space)
        self.space, self.model = self.target.space, analytic_model(self.target, 1)
        self.sampling = self.model.get_model_object("model_sampling")
        self.network = AnalyticNetwork(self.target, self.sampling.sigmas.double().log())
        self.noise = mixture_noise(samples)

    def errors(self, model, solver: str, sigmas: Tensor) -> list[float]:
        if self.name != "mixture":
            return [float(field_scores(self.host, model, solver, sigmas)[1])]
        return self.distances(model, solver, sigmas, self.noise)

    def distances(self, model, solver: str, sigmas: Tensor, noise: Tensor) -> list[float]:
        """Of the mixture: one distance for each item of the batch. The flow keeps the order of the points."""
        begin = start(self.model, sigmas, noise)
        exact = quantiles(self.target, cdf(self.target, begin.flatten(), sigmas[0].double())).reshape(begin.shape)
        off = sample(self.host, model, solver, sigmas, noise).double() - exact
        return off.square().flatten(1).mean(1).sqrt().tolist()

    def told(self, x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        """The network told another level than its input has; eps on VE, velocity on flow."""
        column, heard = (level.double().reshape(-1, *[1] * (x.ndim - 1)) for level in (sigma, told))
        if self.space.kind == "flow":
            return x - column * (x - self.network.denoise(x, told)) / heard
        seen = x * ((1 + heard**2) / (1 + column**2)).sqrt()
        return x - column * (seen - self.network.denoise(seen, told)) / heard

    def data(self, n: int) -> Tensor:
        """Clean latents; of the mixture [n 1], of the field [n 1 side side]."""
        return self.target.sample(n, torch.Generator().manual_seed(SEED)).double()

    def latent(self) -> dict:
        """What is fitted on: 1024 points of the mixture, or four pictures of the field."""
        return {"samples": torch.zeros(1, 1, 32, 32) if self.name == "mixture" else torch.zeros(4, 1, SIDE, SIDE)}

    def run(self, solver: str) -> dict:
        """The inputs of Attune Fit Sampler but for what it fits."""
        nothing = [[torch.zeros(1, 1, 1), {}]]
        (sampler,) = self.host.call("KSamplerSelect", sampler_name=solver)
        return {"model": self.model, "positive": nothing, "negative": nothing, "cfg": 1.0, "sampler": sampler,
                "latent": self.latent(), "seed": SEED}  # fmt: skip

    def applied(self, profile: Calibration, strength: float = 1.0) -> tuple[Any, Tensor]:
        model, _, sigmas, _ = self.host.call(
            "AttuneApplyProfile", model=self.model, profile=profile, steps=0, denoise=1.0, denoise_mode="exact",
            resolution_policy="ignore", strength=strength,
        )  # fmt: skip
        return model, sigmas


def klub(problem: Problem, solver: str, steps: int, early: bool) -> Tensor:
    """The levels of the bound: from its closed form on Gaussian data till they rest, or from `normal` till the error of
    a run on the noises to fit on rises."""
    space, uniform = problem.space, levels(problem.host, problem.model, "normal", steps).double()
    low = float(problem.sampling.sigma_min)
    positive = torch.cat([uniform[:-1], torch.tensor([min(low, float(uniform[-2]) / 2)])])
    ratio = (positive / space.alpha(positive)).clamp(max=TOP_OF_FLOW)
    if not early:
        ratio = klub_optimal_gaussian(steps, float(ratio[-1]), float(ratio[0]), 1.0)
    data = problem.data(4096 if problem.name == "mixture" else 64)
    noise = torch.randn(problem.latent()["samples"].shape, generator=torch.Generator().manual_seed(SEED))

    def as_schedule(ratio: Tensor) -> Tensor:
        inner = space.at_log_ratio(ratio[1:-1].log())
        return torch.cat([uniform[:1], inner, torch.zeros(1).double()]).float()

    def error(ratio: Tensor) -> float:
        sigmas = as_schedule(ratio)
        if problem.name == "mixture":
            return problem.distances(problem.model, solver, sigmas, noise)[0]
        return problem.errors(problem.model, solver, sigmas)[0]

    denoise = ve_denoiser(problem.target.denoise, space)
    generator = torch.Generator().manual_seed(SEED)
    search = minimise_klub(
        denoise, data, ratio, generator, error if early else None, EARLY_SWEEPS if early else SWEEPS
    )  # fmt: skip
    return as_schedule(last(search))


def published(problem: Problem, sigmas: Tensor, parallel: bool) -> Calibration:
    """An alignment by the published loss, as a profile for Attune Apply Profile."""
    noise = torch.randn(problem.latent()["samples"].shape, generator=torch.Generator().manual_seed(SEED))
    data, draws = problem.data(len(noise)), torch.Generator().manual_seed(SEED)
    if problem.name == "mixture":
        data = problem.data(noise[0].numel()).reshape(noise.shape)

    def noised(sigma: float) -> list[Tensor]:
        alpha = float(problem.space.alpha(torch.tensor(sigma)))
        return [alpha * data + sigma * torch.randn(data.shape, generator=draws, dtype=torch.float64)]

    begin = start(problem.model, sigmas, noise)
    highest = float(problem.sampling.sigma_max)
    fit = last(
        align_published(problem.told, sigmas.double(), [begin], problem.space, highest, noised if parallel else None)
    )
    knots = CondLevels("euler", (256, 256), *fit.knots(problem.space))
    family = {"ve": "SD15", "flow": "SD3"}[problem.space.kind]
    return Calibration(
        "published aligner", "published loss", problem.space.kind, (family,), (256, 256), tuple(sigmas.tolist()),
        "a benchmark", solver="euler", alignments=(knots,),
    )  # fmt: skip


def fitted(problem: Problem, solver: str, steps: int) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, MODEL and levels of everything that is fitted here."""
    call, plain = problem.host.call, problem.model
    yield "KLUB minimised", plain, klub(problem, solver, steps, early=False)
    yield "KLUB stopped early", plain, klub(problem, solver, steps, early=True)
    if solver == "euler":
        base = levels(problem.host, plain, BASE, steps)
        for how in ("sequential", "parallel"):
            yield f"{BASE}, published aligner, {how}", *problem.applied(published(problem, base, how == "parallel"))
        profile, *_ = call("AttuneFitSampler", **problem.run(solver), steps=steps, sigmas=base, levels=False, **EFFORT)
        yield f"{BASE}, aligned", *problem.applied(profile)
    profile, *_ = call("AttuneFitSampler", **problem.run(solver), steps=steps, **EFFORT)
    if profile.alignments:
        yield "tuned levels", plain, problem.applied(profile, strength=0.0)[1]
    yield "tuned", *problem.applied(profile)


def rows_of(problem: Problem, solver: str, steps: int) -> dict[str, tuple[float, float, str]]:
    """Name -> error, its standard error over the groups, and for the best free schedule its name."""
    free = {
        name: problem.errors(problem.model, solver, levels(problem.host, problem.model, name, steps))
        for name in SCHEDULES[problem.space.kind]
    }
    best = min(free, key=lambda name: sum(free[name]))
    found = {FREE: (*spread(free[best]), best)}
    for name, model, sigmas in fitted(problem, solver, steps):
        found[name] = (*spread(problem.errors(model, solver, sigmas)), "")
    return found


def spread(errors: list[float]) -> tuple[float, float]:
    values = torch.tensor(errors, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def table(problem: Problem, solver: str, found: dict[int, dict]) -> Table:
    """Schedules down, steps across, thousandths; the best of a column is bold."""
    steps = sorted(found)
    names = [FREE, *(name for name in ROWS if any(name in found[n] for n in steps))]
    least = {n: min(value[0] for value in found[n].values()) for n in steps}

    def text(n: int, name: str) -> str | None:
        if name not in found[n]:
            return None
        error, deviation, _ = found[n][name]
        words = f"{1000 * error:.3g}" + (f" ± {1000 * deviation:.1g}" if deviation else "")
        return f"**{words}**" if error == least[n] else words

    body: list[list] = [[name, *(text(n, name) for n in steps)] for name in names]
    body.insert(1, [BY_NAME, *(found[n][FREE][2] for n in steps)])
    title = f"{problem.name}, {TITLES[problem.space.kind]}, {solver}: distance to the exact end, thousandths"
    return Table(title, ["schedule", *(f"{n} steps" for n in steps)], body)


def measure(host: Host, args: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[Table], list[dict]]:
    tables, data = [], []
    for space in args.spaces:
        for name in TARGETS:
            problem = Problem(host, name, space, args.samples)
            for solver in args.solvers:
                found = {}
                for steps in args.steps:
                    say(f"{space} {name} {solver} {steps}")
                    found[steps] = rows_of(problem, solver, steps)
                    for row, (error, deviation, best) in found[steps].items():
                        data.append(
                            {"space": space, "target": name, "solver": solver, "steps": steps, "row": row,
                             "error": float(f"{error:.6g}"), "standard_error": float(f"{deviation:.3g}"), "name": best}
                        )  # fmt: skip
                tables.append(table(problem, solver, found))
    return [summary(data, args.solvers), *tables], data


def summary(data: list[dict], solvers: list[str]) -> Table:
    """Each method against the best free schedule, over targets and steps."""
    best = {(r["space"], r["target"], r["solver"], r["steps"]): r["error"] for r in data if r["row"] == FREE}
    body: list[list] = []
    for name in ROWS:
        cells: list[str | None] = []
        for solver in solvers:
            mine = [r for r in data if (r["row"], r["solver"]) == (name, solver)]
            ratios = torch.tensor([r["error"] / best[r["space"], r["target"], solver, r["steps"]] for r in mine])
            mean = float(ratios.double().log().mean().exp()) if mine else 0.0
            cells.append(f"{mean:.2f} ({float(ratios.min()):.2f}–{float(ratios.max()):.2f})" if mine else None)
        body.append([name, *cells])
    note = (
        "Geometric mean, least and largest over targets, noises and numbers of steps. The best free schedule is chosen "
        "anew for each with the errors in hand; below 1 the fitted one is nearer to the exact end."
    )
    return Table("Error as a share of the best free schedule's", ["fitted", *solvers], body, note)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--solvers", nargs="+", default=["euler", "dpmpp_2m", "uni_pc"])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 6, 8, 10, 20])
    parser.add_argument("--samples", type=int, default=1024, help="of the mixture per group of seeds; a square number")
    parser.add_argument("--cache", type=Path, help="not used: everything is computed anew in minutes")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables, data = measure(Host(Path(folder)), args, lambda text: print(f"\r{text}      ", end="", flush=True))
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [
        f"Exact denoisers in a network's place. ±: standard error over {GROUPS} groups of seeds with {args.samples} "
        "samples each; the field needs none. Everything fitted saw other noises than it is measured on, and far fewer.",
    ]
    record("exact_fitted", "Fitted schedules where the answer is known", tables, began, (), notes, args.out, data)


if __name__ == "__main__":
    main()
