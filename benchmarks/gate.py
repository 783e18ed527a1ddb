"""Does the gate of a fit keep what it promises? False passes where nothing is to gain, and the chance of a true gain.

python dev.py bench gate [--targets ...] [--solvers ...] [--presets ...] [--fits 40] [--quick]

Three targets whose denoiser is known: pictures whose contents vary as a whole (a mixture in 32 dimensions, spread over
the picture by an orthonormal map), pictures of independent blocks (the same mixture in every 8x8 block), a Gaussian
field with a 1/f spectrum. For each the best levels of 8 steps are searched on a population of pictures, for Euler its
best timesteps, too, which the network then takes for the true ones. Handed to the tuner as the only known schedule,
nothing is left to gain: whatever passes the gate is a false pass. Then the levels are moved from there towards the
worst stock schedule until the population's error has risen so far that 10 % or 20 % are to be gained: how often is that
found and let pass? Beside it the gate alone: true errors of pictures before and after, the latter multiplied so that
the true gain is 0, 10 or 20 %, drawn in numbers as each preset holds out. No network, no host.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import _pack  # noqa: F401
from analytic import Mixture, PowerLawField
from harness import last
from oracles import dpmpp_2m, fine_levels, network, path, stock_schedules
from pack.kernels.conditioning import ConditioningMap
from pack.kernels.gate import judge
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import align
from pack.kernels.tuner import TUNER_PRESETS, Runner, Tuned, moved_level, picture_errors, reference_levels, tune
from pack.kernels.types import Latent, Sigma, Sigmas
from results import DOCS, Table, markdown, record

SPACE = NoiseSpace("ve")
LOWEST, HIGHEST = 0.0292, 14.6146
SIDE, BLOCK = 32, 8
BLOCKS = (SIDE // BLOCK) ** 2
STEPS = 8
SOLVERS = ["dpmpp_2m", "euler"]
GAINS = [0.1, 0.2]
POPULATION = 128  # pictures


def contents(scale: float, std: float = 0.5) -> Mixture:
    """24 contents in 16 dimensions whose size falls as 1/f, wide enough to overlap; `scale` multiplies everything."""
    fall = 1 / (1 + torch.arange(16, dtype=torch.float64) / 2)
    means = torch.randn(24, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * fall
    means = scale * means / means.square().mean().sqrt()
    return Mixture(torch.full((24,), 1 / 24).double(), means, torch.full((24,), scale * std).double(), SPACE)


class Pictures:
    """Pictures [b 1 side side] with a content in every 8x8 block and one of the whole picture, `shared` times as large
    (0: none).

    The dimensions of both become orthonormal patterns, so the denoiser of a picture is the sum of theirs.
    """

    def __init__(self, shared: float):
        self.space, self.shared = SPACE, shared
        self.of_block, self.of_picture = contents(1.0), contents(max(shared, 1.0))
        generator, d = torch.Generator().manual_seed(5), 16
        drawn = lambda *size: torch.linalg.qr(torch.randn(*size, generator=generator, dtype=torch.float64)).Q
        block = drawn(BLOCK**2, BLOCK**2)
        self.block, rest = block[:, :d], block[:, d:]  # [64 16], [64 48]
        self.picture = torch.einsum("pr,brd->bpd", rest, drawn(BLOCKS * rest.shape[1], d).reshape(BLOCKS, -1, d))

    def denoise(self, x: Latent, sigma: Sigma) -> Latent:
        n, side = len(x), SIDE // BLOCK
        rows = x.reshape(n, side, BLOCK, side, BLOCK).transpose(2, 3).reshape(n, BLOCKS, -1)
        level = sigma.flatten() if sigma.numel() > 1 else sigma.reshape(())
        each = level.repeat_interleave(BLOCKS) if level.ndim else level
        found = (self.of_block.denoise((rows @ self.block).flatten(0, 1), each) @ self.block.T).reshape(rows.shape)
        if self.shared:
            common = self.of_picture.denoise(torch.einsum("nbp,bpd->nd", rows, self.picture), level)
            found = found + torch.einsum("nd,bpd->nbp", common, self.picture)
        return found.reshape(n, side, side, BLOCK, BLOCK).transpose(2, 3).reshape(x.shape)


TARGETS = {
    "whole pictures": lambda: Pictures(shared=4.0),
    "independent blocks": lambda: Pictures(shared=0.0),
    "1/f field": lambda: PowerLawField(1, SIDE, SPACE),
}


def noise(count: int, seed: int) -> Latent:
    drawn = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return HIGHEST * drawn


def exact_ends(target, x: Latent) -> Latent:
    """Where the probability-flow ODE takes x from the highest level."""
    if isinstance(target, PowerLawField):
        std = target.stds()
        return torch.fft.ifft2(torch.fft.fft2(x) * std / (std**2 + HIGHEST**2).sqrt()).real
    return path(target, x, fine_levels(SPACE, 64)).end


class Problem:
    """One target and solver: its best levels, a network that is right there, and the true errors of 8 steps."""

    def __init__(self, name: str, solver: str, count: int = POPULATION):
        self.target, self.solver = TARGETS[name](), solver
        self.count = count
        self.right: ConditioningMap | None = None  # what Euler's network takes for the true levels
        self.told = network(self.target, "eps")
        population = noise(self.count, 1)
        ends = exact_ends(self.target, population)
        self.error = lambda sigmas: float(picture_errors(self.solve(sigmas, population, None), ends).mean())
        self.best = min(stock_schedules(STEPS).values(), key=self.error)
        for move in (0.35, 0.1, 0.1) if solver == "euler" else (0.35,):
            if solver == "euler":
                self.right = self._aligned(population)
            self.best = self._searched(move)
        self.fresh = noise(self.count, 2)
        self.fresh_ends = exact_ends(self.target, self.fresh)

    def denoise(self, x: Latent, sigma: Sigma, sigma_cond: Sigma) -> Latent:
        return self.told(x, sigma, sigma_cond if self.right is None else self.right(sigma_cond))

    def solve(self, sigmas: Sigmas, x: Latent, a_map: ConditioningMap | None) -> Latent:
        if self.solver == "dpmpp_2m":
            return self.record(sigmas, x).end
        for sigma, sigma_next in pairwise(sigmas):
            level = sigma.expand(len(x))
            denoised = self.denoise(x, level, level if a_map is None else a_map(level))
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
        return x

    def record(self, sigmas: Sigmas, x: Latent):
        return dpmpp_2m(self.target.denoise, x, sigmas, SPACE)

    def runner(self) -> Runner:
        return Runner(self.solve, self.record, self.denoise if self.solver == "euler" else None, highest=HIGHEST)

    def true_errors(self, sigmas: Sigmas, a_map: ConditioningMap | None = None) -> Tensor:
        """On pictures that no fit has seen, [pictures]."""
        return picture_errors(self.solve(sigmas, self.fresh, a_map), self.fresh_ends)

    def handicapped(self, gain: float) -> Sigmas:
        """Levels from which the best ones are a gain of this share, on the way to the worst stock schedule."""
        worst, least = max(stock_schedules(STEPS).values(), key=self.error), self.error(self.best)
        ends = [SPACE.log_ratio(levels[1:-1]) for levels in (self.best, worst)]
        low, high = 0.0, 1.0
        moved = self.best
        for _ in range(20 if gain else 0):
            share = (low + high) / 2
            inner = SPACE.at_log_ratio(torch.lerp(*ends, share))
            moved = torch.cat([self.best[:1], inner, self.best[-1:]])
            low, high = (low, share) if least < (1 - gain) * self.error(moved) else (share, high)
        return moved

    def _aligned(self, population: Latent) -> ConditioningMap | None:
        self.right = None
        exact = path(self.target, population, fine_levels(SPACE, 48))
        return last(align(self.denoise, self.best, [exact], SPACE, HIGHEST)).through(SPACE)

    def _searched(self, move: float) -> Sigmas:
        """The tuner's pattern search to its end, on the whole population."""
        best, least = self.best, self.error(self.best)
        while move > 0.02:
            gained = False
            for i in range(1, STEPS):
                for moved in (moved_level(best, i, sign * move, SPACE) for sign in (1, -1)):
                    if (error := self.error(moved)) < 0.999 * least:
                        best, least, gained = moved, error, True
                        break
            move = move if gained else move / 2
        return best


@dataclass(frozen=True)
class Fit:
    """change: of the true mean error, 0 where nothing passed."""

    passed: bool
    change: float
    evaluations: int


def fit(problem: Problem, preset: str, start: Sigmas, seed: int) -> Fit:
    """One tuning from the only known schedule, and what it has truly done."""
    chosen = TUNER_PRESETS[preset]
    noises = list(noise(chosen.fit + chosen.held_out, 1000 + seed).split(1))
    reference = reference_levels(chosen.reference_steps, SPACE, LOWEST, HIGHEST)
    tuned: Tuned = last(tune(problem.runner(), {"start": start}, reference, noises, chosen, SPACE))
    passed = any(verdict.accepted for verdict in tuned.verdicts.values())
    if not passed:
        return Fit(False, 0.0, tuned.evaluations)
    a_map = tuned.alignment and tuned.alignment.through(SPACE)
    before, after = problem.true_errors(start).mean(), problem.true_errors(tuned.sigmas, a_map).mean()
    return Fit(True, float(after / before) - 1, tuned.evaluations)


def passes_alone(problem: Problem, preset: str, gain: float, draws: int = 1000) -> float:
    """How often the gate lets a known gain pass, [0, 1]: the true errors of the handicapped and the best levels, the
    latter multiplied so that their mean is lower by `gain`, and as many pictures drawn of them as the preset holds out.
    """
    before = problem.true_errors(problem.handicapped(max(GAINS)))
    after = problem.true_errors(problem.best)
    after = after * (1 - gain) * before.mean() / after.mean()
    generator, held_out = torch.Generator().manual_seed(0), TUNER_PRESETS[preset].held_out
    looks = 2 if problem.solver == "euler" else 1
    drawn = [torch.randperm(len(before), generator=generator)[:held_out] for _ in range(draws)]
    return sum(judge(before[i], after[i], looks).accepted for i in drawn) / draws


def measure(
    names: list[str], solvers: list[str], presets: list[str], fits: int, count: int, say: Callable[[str], None]
) -> tuple[list[Table], list[dict]]:
    """Null, power and gate alone, as tables; one row of data for each target, solver, preset and gain."""
    data = []
    for name, solver in [(name, solver) for name in names for solver in solvers]:
        say(f"{name}, {solver}")
        problem = Problem(name, solver, count)
        for gain in [0.0, *GAINS]:
            start = problem.handicapped(gain)
            for preset in presets:
                many = fits if gain == 0 and preset != "standard" else max(fits // 2, 1)
                found = [fit(problem, preset, start, seed) for seed in range(many)]
                data.append(
                    {"target": name, "solver": solver, "preset": preset, "gain": gain, "fits": many,
                     "passed": sum(one.passed for one in found),
                     "worse": sum(one.change > 0 for one in found),
                     "mean_change": sum(one.change for one in found) / many,
                     "worst_change": max(one.change for one in found),
                     "alone": passes_alone(problem, preset, gain)}
                )  # fmt: skip
                say(f"{name}, {solver}, {preset}, {gain:.0%}: {data[-1]['passed']} of {many}")
    return [null_table(data), power_table(data, presets)], data


def null_table(data: list[dict]) -> Table:
    body = [
        [row["target"], row["solver"], row["preset"], f"{row['passed']} of {row['fits']}", str(row["worse"]),
         f"{row['mean_change']:+.1%}", f"{row['worst_change']:+.1%}", f"{row['alone']:.1%}"]
        for row in data if row["gain"] == 0
    ]  # fmt: skip
    columns = ["target", "solver", "preset", "passed", "of them truly worse", "mean change", "worst", "gate alone"]
    note = (
        "Changes of the true error on fresh pictures, 0 where nothing passed, over all fits. Gate alone: how often a "
        "schedule of equal mean error passes, the errors of a worse one multiplied; 1000 draws."
    )
    return Table("Nothing to gain: what passes", columns, body, note)


def power_table(data: list[dict], presets: list[str]) -> Table:
    body = []
    for gain in GAINS:
        for name, solver in dict.fromkeys((row["target"], row["solver"]) for row in data):
            of = {
                row["preset"]: row
                for row in data
                if (row["target"], row["solver"], row["gain"]) == (name, solver, gain)
            }
            cells = [
                f"{of[p]['alone']:.0%} · {of[p]['passed']} of {of[p]['fits']} ({of[p]['mean_change']:+.1%})"
                for p in presets
            ]
            body.append([f"{gain:.0%}", name, solver, *cells])
    note = (
        "First the gate alone: how often it lets this gain of the mean error pass. Then whole fits from levels so much "
        "worse than the best: how many passed, and the mean change of the true error over all of them."
    )
    return Table("A true gain: what passes", ["gain", "target", "solver", *presets], body, note)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--presets", nargs="+", choices=list(TUNER_PRESETS), default=list(TUNER_PRESETS))
    parser.add_argument("--fits", type=int, default=40, help="where nothing is to gain; elsewhere half as many")
    parser.add_argument("--quick", action="store_true", help="a minute: one target, the smallest preset, 8 fits")
    parser.add_argument("--cache", type=Path, help="not used: everything is computed anew in minutes")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = POPULATION
    if args.quick:
        args.targets, args.presets, args.fits, count = ["1/f field"], ["mini"], 8, 16
        args.solvers = ["euler"]
    say = lambda text: print(text, flush=True)
    tables, data = measure(args.targets, args.solvers, args.presets, args.fits, count, say)
    print("\n" + "\n".join(map(markdown, tables)))
    notes = [f"{STEPS} steps, pictures of {BLOCKS} blocks, {count} of them in a population and as many fresh ones."]
    record("gate", "The gate of a fit", tables, began, (), notes, args.out, data)


if __name__ == "__main__":
    main()
