"""The tuner on exact mixtures: against the best of the known schedules, on noises it has never seen."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from nightly import daily
from oracles import (
    dpmpp_2m,
    fine_levels,
    finish,
    mixture_1d,
    mixture_2d,
    mixture_latent,
    network,
    path,
    stock_schedules,
)
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import block_norm
from pack.kernels.tuner import TUNER_PRESETS, Runner, TunerPreset, moved_level, tune

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
ROWS = 256  # blocks of one noise, as in a latent of SDXL
DATA = {"1d": mixture_1d, "2d": mixture_2d, "latent": mixture_latent}


def told_euler(denoise, x, sigmas, a_map=None):
    for sigma, sigma_next in pairwise(sigmas):
        told = sigma if a_map is None else a_map(sigma)
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma, told)) / sigma
    return x


class Bench:
    """One mixture and solver as a Runner that counts its evaluations."""

    def __init__(self, target, solver: str, prediction: str = "eps"):
        self.target, self.solver, self.calls = target, solver, 0
        self.told = network(target, prediction)
        self.scale = 14.648 if target.space.kind == "ve" else 1.0
        told = self.denoise if solver == "euler" else None
        self.runner = Runner(self.solve, self.record, told)

    def exact(self, x, sigma):
        self.calls += 1
        return self.target.denoise(x, sigma)

    def denoise(self, x, sigma, told):
        self.calls += 1
        return self.told(x, sigma, told)

    def solve(self, sigmas, x, a_map):
        if self.solver == "euler":
            return told_euler(self.denoise, x, sigmas, a_map)
        return dpmpp_2m(self.exact, x, sigmas, self.target.space).end

    def record(self, sigmas, x):
        return dpmpp_2m(self.exact, x, sigmas, self.target.space)

    def noises(self, n, seed=0):
        d = self.target.means.shape[1]
        generator = torch.Generator().manual_seed(seed)
        return list(self.scale * torch.randn(n, ROWS, d, generator=generator, dtype=torch.float64))

    def truth(self, seed=99):
        (x,) = self.noises(1, seed)
        return x, path(self.target, x).end

    def error(self, sigmas, truth, a_map=None):
        x, end = truth
        return block_norm(self.solve(sigmas, x, a_map) - end) / block_norm(end)


def karras(n):
    return stock_schedules(n)["karras"]


def ratio_to_the_best_known(data, solver, steps, preset="quick"):
    """Error on unseen noises against the best of all known schedules, chosen with those noises in hand."""
    bench = Bench(DATA[data](VE), solver)
    known = stock_schedules(steps)
    chosen = TUNER_PRESETS[preset]
    noises = bench.noises(chosen.fit + chosen.held_out)
    tuned, _ = finish(tune(bench.runner, known, karras(chosen.reference_steps), noises, chosen, VE))
    truth = bench.truth()
    best = min(bench.error(sigmas, truth) for sigmas in known.values())
    a_map = tuned.alignment and tuned.alignment.through(VE)
    return bench.error(tuned.sigmas, truth, a_map) / best


EVERY = [(data, steps) for data in DATA for steps in (5, 8, 10, 20)]
FEW = [("1d", 5), ("2d", 10), ("latent", 5)]  # each target once, few steps and more
CELLS = pytest.mark.parametrize("cells", daily([FEW, EVERY], FEW), ids=["few", "every"])


@CELLS
def test_euler_is_at_least_two_fifths_nearer_than_the_best_known_schedule(cells):
    ratios = [ratio_to_the_best_known(data, "euler", n) for data, n in cells]
    assert max(ratios) <= 0.60, ratios
    assert math.prod(ratios) ** (1 / len(ratios)) <= 0.40, ratios


@CELLS
def test_dpmpp_2m_is_never_much_worse_and_mostly_better(cells):
    found = {data: [ratio_to_the_best_known(data, "dpmpp_2m", n) for at, n in cells if at == data] for data in DATA}
    ratios = [ratio for of_data in found.values() for ratio in of_data]
    assert max(ratios) <= 1.15, found
    assert math.prod(ratios) ** (1 / len(ratios)) <= 0.90, found
    assert math.prod(found["2d"]) ** (1 / len(found["2d"])) <= 0.85, found


def test_euler_on_a_flow_model():
    bench = Bench(mixture_latent(FLOW), "euler", "flow")
    shift = lambda s, a: a * s / (1 + (a - 1) * s)
    line = torch.linspace(1, 0, 9, dtype=torch.float64)
    known = {f"simple, shift {a}": shift(line, a) for a in (1.0, 3.0)}
    tuned, _ = finish(tune(bench.runner, known, fine_levels(FLOW, 48), bench.noises(11), TUNER_PRESETS["quick"], FLOW))
    truth = bench.truth()
    best = min(bench.error(sigmas, truth) for sigmas in known.values())
    assert bench.error(tuned.sigmas, truth, tuned.alignment.through(FLOW)) <= 0.8 * best


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_every_evaluation_is_counted_and_none_is_unannounced(solver):
    bench = Bench(mixture_1d(VE), solver)
    tuned, said = finish(tune(bench.runner, stock_schedules(8), karras(32), bench.noises(7), TUNER_PRESETS["mini"], VE))
    assert tuned.evaluations == bench.calls == said[-1].evaluations
    assert tuned.evaluations <= said[0].predicted <= 800
    assert [p.evaluations for p in said] == sorted(p.evaluations for p in said)
    assert len({p.predicted for p in said}) == 1
    errors = [p.error for p in said]
    assert errors == sorted(errors, reverse=True) and math.isinf(errors[0])
    assert len(tuned.candidates) == 9 and tuned.candidates[tuned.start] == min(tuned.candidates.values())
    check_sigmas(tuned.sigmas)
    assert tuned.sigmas[0] == stock_schedules(8)[tuned.start][0] and tuned.sigmas[-1] == 0 and len(tuned.sigmas) == 9


def test_the_same_noises_give_the_same_answer():
    results = []
    for _ in range(2):
        bench = Bench(mixture_1d(VE), "euler")
        results.append(
            finish(tune(bench.runner, stock_schedules(5), karras(32), bench.noises(7), TUNER_PRESETS["mini"], VE))[0]
        )
    assert torch.equal(results[0].sigmas, results[1].sigmas) and results[0].held_out == results[1].held_out


def test_what_does_not_help_on_held_out_noises_is_dropped():
    """A solver that lies on the noise it is fitted on: every move looks good there and is bad elsewhere."""
    bench = Bench(mixture_1d(VE), "dpmpp_2m")
    known = {"karras": karras(6)}
    noises = bench.noises(7)

    def flattering(sigmas, x, a_map):
        end = bench.solve(sigmas, x, a_map)
        moved = float((sigmas - known["karras"]).abs().sum())
        truth = bench.record(karras(32), x).end
        return truth + (end - truth) * math.exp(-moved if torch.equal(x, noises[0]) else moved)

    runner = Runner(flattering, bench.record)
    tuned, _ = finish(tune(runner, known, karras(32), noises, TUNER_PRESETS["mini"], VE))
    assert torch.equal(tuned.sigmas, known["karras"]) and not tuned.changed
    assert list(tuned.held_out) == ["start"] and "refined levels were not kept" in tuned.refused[0]


def test_the_start_is_the_best_of_two_on_all_noises():
    """The schedule that is best on the fitted noise by luck alone does not become the start."""
    bench = Bench(mixture_1d(VE), "dpmpp_2m")
    noises = bench.noises(7)
    lucky, sound, worst = (stock_schedules(8)[name] for name in ("karras", "exponential", "normal"))

    def solve(sigmas, x, a_map):
        end = bench.record(karras(32), x).end
        error = 0.5 if torch.equal(sigmas, sound) else 0.4 if torch.equal(x, noises[0]) else 0.8
        return end * (2 if torch.equal(sigmas, worst) else 1 + error)

    known = {"lucky": lucky, "sound": sound, "worst": worst}
    tuned, said = finish(tune(Runner(solve, bench.record), known, karras(32), noises, TUNER_PRESETS["mini"], VE))
    assert min(tuned.candidates, key=tuned.candidates.get) == "lucky"
    assert tuned.start == "sound" and torch.equal(tuned.sigmas, sound)
    assert tuned.held_out["start"] == pytest.approx(0.5, rel=1e-5)
    assert tuned.evaluations <= said[0].predicted


def test_a_reference_that_is_no_better_than_the_candidates_stops_the_search():
    bench = Bench(mixture_2d(VE), "dpmpp_2m")
    poor = TunerPreset(1, 1, 8, 2, 12)
    tuned, said = finish(tune(bench.runner, {"fine": karras(40)}, karras(8), bench.noises(2), poor, VE))
    assert torch.equal(tuned.sigmas, karras(40)) and "The levels were not searched" in tuned.refused[0]
    assert "refining" not in {p.stage for p in said}


def test_without_time_the_best_known_schedule_comes_back_at_once():
    bench = Bench(mixture_1d(VE), "euler")
    known = stock_schedules(5)
    tuned, said = finish(
        tune(bench.runner, known, karras(32), bench.noises(7), TUNER_PRESETS["mini"], VE, lambda: False)
    )
    assert torch.equal(tuned.sigmas, known[tuned.start]) and tuned.alignment is None
    assert {p.stage for p in said} == {"reference", "known schedules", "held-out noises"}


@pytest.mark.parametrize(
    ("space", "levels"), [(VE, [14.6, 2.0, 0.3, 0.0]), (FLOW, [1.0, 0.6, 0.3, 0.0]), (FLOW, [1.0, 0.4, 0.0])]
)
@pytest.mark.parametrize("share", [0.35, -0.35, 0.04])
def test_a_move_keeps_the_order_and_the_other_levels(space, levels, share):
    sigmas = torch.tensor(levels)
    for i in range(1, len(levels) - 1):
        moved = check_sigmas(moved_level(sigmas, i, share, space))
        assert (moved > sigmas).nonzero().flatten().tolist() == ([i] if share > 0 else [])
        assert (moved < sigmas).nonzero().flatten().tolist() == ([i] if share < 0 else [])


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "no schedule"),
        ({"a": [2.0, 1.0]}, "'a' does not end in 0"),
        ({"a": [2.0, 0.0], "b": [2.0, 1.0, 0.0]}, r"one number of steps, but these have \[1, 2\]"),
        ({"a": [2.0, 3.0, 0.0]}, "must decrease"),
    ],
)
def test_candidates_that_cannot_be_compared_are_refused_before_any_evaluation(known, words):
    bench = Bench(mixture_1d(VE), "euler")
    schedules = {name: torch.tensor(levels) for name, levels in known.items()}
    with pytest.raises(ValueError, match=words):
        next(tune(bench.runner, schedules, karras(32), bench.noises(7), TUNER_PRESETS["mini"], VE))
    assert bench.calls == 0


def test_the_number_of_noises_must_fit_the_preset():
    bench = Bench(mixture_1d(VE), "euler")
    with pytest.raises(ValueError, match="needs 7 noises, but there are 3"):
        next(tune(bench.runner, stock_schedules(5), karras(32), bench.noises(3), TUNER_PRESETS["mini"], VE))
