"""Forecasts against least squares, brute force and targets whose answers are known in closed form."""

from __future__ import annotations

import itertools

import pytest
import torch

from pack.kernels.forecast import (
    BOTH_SIDES,
    MOST_ANSWERS,
    OPEN_RIDGE,
    Asked,
    Kinds,
    aim,
    climb,
    expected_error,
    fit_weights,
    forecast,
    forecast_errors,
    mean_products,
    missed,
    neighbours,
    one_sided_errors,
    optimal_kinds,
    parts,
)
from pack.kernels.one_sided import FIRST_WHOLE, Difference, Differences
from pack.kernels.propagation import optimal_keys, step_weights
from pack.kernels.space import NoiseSpace

VE = NoiseSpace("ve")
SIGMAS = [14.0, 9.0, 5.0, 3.0, 2.0, 1.2, 0.7, 0.4, 0.2, 0.0]


def gaussian_run(dims: int = 400, spread: float = 0.7, seed: int = 0) -> tuple[list, list]:
    """Euler on N(0, spread^2 per axis of its own): D = s^2 / (s^2 + sigma^2) x, axis by axis."""
    generator = torch.Generator().manual_seed(seed)
    s2 = (spread * torch.linspace(0.2, 2.0, dims, dtype=torch.float64)) ** 2
    x = SIGMAS[0] * torch.randn(2, dims, generator=generator, dtype=torch.float64)
    states, answers = [], []
    for sigma, below in itertools.pairwise(SIGMAS):
        d = s2 / (s2 + sigma**2) * x
        states.append(x)
        answers.append(d)
        x = below / sigma * x + (1 - below / sigma) * d
    return states, answers


def test_inner_products_are_means_of_products_also_in_chunks(monkeypatch):
    tensors = [torch.randn(3, 50, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    flat = torch.stack([one.flatten() for one in tensors]).double()
    expected = flat @ flat.T / 150
    assert torch.allclose(mean_products(tensors), expected, atol=1e-12)
    monkeypatch.setattr("pack.kernels.forecast.AT_A_TIME", 7)
    assert torch.allclose(mean_products(tensors), expected, atol=1e-12)


@pytest.mark.parametrize(("gap", "age", "step"), [(0, 1, 1), (0, 3, 7), (2, 1, 5), (3, 4, 8)])
def test_an_expected_error_is_that_of_least_squares_with_the_tensors_themselves(gap, age, step):
    x, d = gaussian_run()
    found = forecast_errors(mean_products([*x, *d]), 4, 4)[gap, age - 1, step]
    k = step - age
    rows = [x[step] - x[k], *([d[k] - d[k - gap]] if gap else [])]
    a = torch.stack([row.flatten() for row in rows], 1)
    damped = torch.cat([a, torch.diag(OPEN_RIDGE**0.5 * a.norm(dim=0))])
    target = (d[step] - d[k]).flatten()
    wanted = torch.cat([target, torch.zeros(len(rows), dtype=a.dtype)])
    rest = wanted - damped @ torch.linalg.lstsq(damped, wanted[:, None]).solution[:, 0]
    assert found == pytest.approx(float(rest.square().sum() / target.numel()) ** 0.5, rel=1e-6)
    errors = forecast_errors(mean_products([*x, *d]), 4, 4)
    assert errors[gap, age - 1, : age + gap].isinf().all() and errors[gap, age - 1, age + gap :].isfinite().all()


def test_answers_on_a_line_are_forecast_without_error():
    base, way = torch.randn(2, 1, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = [base + i * way for i in range(6)]
    x = [torch.randn(1, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + i)) for i in range(6)]
    errors = forecast_errors(mean_products([*x, *d]), 2, 2)
    assert errors[1, 0, 2:].max() < 0.05 * errors[0, 0, 1:].min()


def test_what_is_predicted_of_one_sided_steps_is_what_they_do():
    """The error by inner products is that of the predictor itself."""
    generator = torch.Generator().manual_seed(3)
    e = [torch.randn(1, 200, generator=generator, dtype=torch.float64) + 3 for _ in SIGMAS[:-1]]
    found = one_sided_errors(mean_products(e), SIGMAS, 5.0, VE, torch.zeros(3, 3, 9, dtype=torch.float64))
    for gap, age, step in [(0, 1, 4), (1, 1, 5), (2, 3, 6)]:
        kept = Differences(VE)
        for i in sorted({step - age - gap, step - age}):
            kept.keep(None, Difference(i, SIGMAS[i], "", e[i]))
        missed_e = kept.predict(None, step - age, SIGMAS[step], "", e[step]) - e[step]
        assert found[gap, age - 1, step] == pytest.approx(4.0 * SIGMAS[step] * float(missed_e.square().mean()) ** 0.5)
    assert found[2, 2, :5].isinf().all()


def every_plan(n: int, always: set):
    """(keys, one-sided ones) of every plan that is allowed."""
    for kinds in itertools.product((0, 1, 2), repeat=n - 1):
        keys = [0, *(i for i in range(1, n) if kinds[i - 1])]
        alone = {i for i in range(1, n) if kinds[i - 1] == 1}
        neighbours = any(a in alone and b in alone for a, b in itertools.pairwise(keys))
        if not (neighbours or alone & always or any(i < FIRST_WHOLE for i in alone) or not always <= set(keys)):
            yield keys, alone


def error_of(keys, alone, forecasts, sided, weights) -> float:
    gaps, ages, n = forecasts.shape
    total, last, gap = 0.0, 0, 0
    for i in range(1, n):
        age = i - last
        if age > ages:
            return float("inf")
        if i in keys:
            total += weights[i] * float(sided[gap, age - 1, i]) if i in alone else 0.0
            last, gap = i, min(age, gaps - 1)
        else:
            total += weights[i] * float(forecasts[gap, age - 1, i])
    return total


@pytest.mark.parametrize("always", [set(), {4}])
def test_the_best_plan_of_each_cost_is_that_of_brute_force(always):
    generator = torch.Generator().manual_seed(5)
    n = 8
    forecasts, sided = torch.rand(2, 3, 4, n, generator=generator, dtype=torch.float64) + 0.1
    weights = (torch.rand(n, generator=generator) + 0.5).tolist()
    best: dict[int, float] = {}
    for keys, alone in every_plan(n, always):
        cost = BOTH_SIDES * len(keys) - len(alone)
        best[cost] = min(best.get(cost, float("inf")), error_of(keys, alone, forecasts, sided, weights))
    found = optimal_kinds(forecasts, sided, weights, always)
    assert {count: pytest.approx(plan.error) for count, plan in found.items()} == {
        count: error for count, error in sorted(best.items()) if error < float("inf")
    }
    for count, plan in found.items():
        assert 2 * plan.cost() == count
        assert error_of(plan.keys, {*plan.one_sided}, forecasts, sided, weights) == pytest.approx(plan.error)
        assert expected_error(plan, forecasts, sided, weights) == pytest.approx(plan.error)


def test_the_plans_around_one_move_one_step_and_are_allowed():
    n, always = 9, {5}
    allowed = {(tuple(keys), tuple(sorted(alone))) for keys, alone in every_plan(n, always)}
    plan = Kinds((0, 3, 5, 8), (3,), 0.0)
    around = neighbours(plan, n, always)
    assert {one.asked for one in around} <= allowed and all(one.cost() == plan.cost() for one in around)
    assert {one.keys for one in around} == {
        (0, 4, 5, 8),
        (0, 3, 5, 7),
        (0, 3, 5, 6),
    }  # 3 would not stay one-sided at 1, 2


def climbed(start: Kinds, score, expected, tries: int) -> tuple[Kinds, list]:
    """What the search finds, and what it tried."""
    tried: list = []
    search = climb(start, lambda one: neighbours(one, 10), expected, tries)
    plan = next(search)
    try:
        while True:
            tried.append(plan.asked)
            plan = search.send(score(plan))
    except StopIteration as end:
        return end.value, tried


def test_climbing_finds_the_best_plan_tries_none_twice_and_never_ends_worse_than_it_began():
    start, goal = Kinds((0, 2, 9), (), 0.0), (0, 5, 7)
    near = lambda plan: -sum(abs(a - b) for a, b in zip(plan.keys, goal, strict=True))
    found, tried = climbed(start, near, lambda plan: sum(plan.keys), 60)
    assert found.keys == goal and len(tried) == len(set(tried)) <= 61 and tried[0] == start.asked
    found, tried = climbed(start, lambda plan: float(plan is start), lambda plan: 0.0, 3)
    assert found is start and len(tried) == 4


def test_without_one_sided_steps_the_keys_are_those_of_the_other_programme():
    x, d = gaussian_run()
    errors, weights = forecast_errors(mean_products([*x, *d]), 4, 4), step_weights(SIGMAS, VE)
    other = optimal_keys(errors, weights)
    found = optimal_kinds(errors, None, weights)
    assert {count // BOTH_SIDES: frozenset(plan.keys) for count, plan in found.items()} == {
        count: keys for count, (_, keys) in other.items()
    }


def test_a_fitted_forecast_is_least_squares_and_reaches_what_is_in_its_span():
    x, d = gaussian_run()
    past = [Asked(a, b) for a, b in zip(x[:4], d[:4], strict=True)]
    wanted = past[-1].answer + sum(w * f for w, f in zip((0.3, -0.2, 0.1, 0.05), parts(x[4], past), strict=True))
    weights = fit_weights(wanted, x[4], past)
    assert len(weights) == MOST_ANSWERS + 1
    assert torch.allclose(forecast(weights, x[4], past), wanted, rtol=0, atol=1e-2 * float(wanted.std()))
    held = past[-1].answer.clone()
    forecast(weights, x[4], past)
    assert torch.equal(past[-1].answer, held)  # nothing is written into


def test_a_forecast_of_an_exact_target_is_nearer_than_the_line_and_the_held_answer():
    """On fresh noise of the same target: the numbers are no matter of one picture."""
    x, d = gaussian_run()
    fresh_x, fresh_d = gaussian_run(seed=7)
    past, fresh = ([Asked(a[i], b[i]) for i in (1, 3, 4)] for a, b in ((x, d), (fresh_x, fresh_d)))
    said = forecast(fit_weights(d[6], x[6], past), fresh_x[6], fresh)
    error = lambda guess: float((guess - fresh_d[6]).norm())
    line = fresh_d[4] + 2.0 * (fresh_d[4] - fresh_d[3])
    assert error(said) < 0.2 * error(line) and error(said) < 0.2 * error(fresh_d[4])
    assert float(missed(said, fresh_d[6], fresh_d[4])) < 0.2


def test_an_euler_step_along_the_aim_goes_back_towards_the_recorded_run(monkeypatch):
    x, d = gaussian_run()
    recorded, astray = Asked(x[5], d[5]), x[5] + 0.1
    ratio = SIGMAS[6] / SIGMAS[5]
    step = lambda state, answer: ratio * state + (1 - ratio) * answer
    off = lambda: float((step(astray, aim(astray, recorded, SIGMAS[5], SIGMAS[6])) - x[6]).abs().max())
    assert off() == pytest.approx(0.4 * ratio * 0.1)
    monkeypatch.setattr("pack.kernels.forecast.PULL", 1.0)
    assert off() < 1e-12
    assert torch.equal(aim(astray, recorded, SIGMAS[-2], 0.0), d[5])
