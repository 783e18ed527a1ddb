"""Solvers as published, which the fitted sampler is measured beside: a known answer for each."""

from __future__ import annotations

import pytest
import torch

from oracles import dpmpp_2m, fine_levels, gaussian, mixture_latent, path
from pack.kernels.schedules import resample_theta
from pack.kernels.space import NoiseSpace
from published import ESTIMATES, OF, PlanStep, fit_olss, plan_weights, search_plan, solve_olss, solve_plan

SPACES = ["ve", "flow"]


def start(target, n: int, seed: int, first: float) -> torch.Tensor:
    return first * torch.randn(n, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(kind: str, n: int = 8, seed: int = 1):
    """A mixture's denoiser, the exact path of some noises, and levels of a short run along it."""
    target = mixture_latent(NoiseSpace(kind))
    fine = fine_levels(target.space, 64)
    exact = path(target, start(target, n, seed, float(fine[0])), fine)
    return target, exact, lambda steps: resample_theta(fine, steps, target.space)


@pytest.mark.parametrize("kind", SPACES)
def test_the_unified_solver_has_dpm_solver_2m_in_it(kind):
    target, exact, levels = problem(kind)
    sigmas = levels(8)
    ours = solve_plan(target.denoise, exact.states[0], sigmas, (PlanStep(),) * 8, target.space)
    assert torch.allclose(
        ours, dpmpp_2m(target.denoise, exact.states[0], sigmas, target.space).end, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_order_converges_as_it_says(kind, of, order):
    target = gaussian(0.8, NoiseSpace(kind))
    ends = torch.tensor([0.9, 0.1], dtype=torch.float64)
    x = torch.ones(1, dtype=torch.float64)
    exact = target.flow(x, *ends)

    def error(steps: int, estimate: str) -> float:
        sigmas = torch.logspace(*ends.log10().tolist(), steps + 1, dtype=torch.float64)
        end = solve_plan(target.denoise, x, sigmas, (PlanStep(order, of, estimate),) * steps, target.space)
        return float((end - exact).abs())

    for estimate in ESTIMATES:  # the first step has one answer alone
        assert error(160, estimate) < 2 ** (0.2 - min(order, 2)) * error(80, estimate), estimate


@pytest.mark.parametrize("of", OF)
def test_all_answers_give_the_integral_of_their_polynomial(of):
    places, h = [0.0, -0.3, -0.8], 0.5
    s = torch.linspace(0, h, 20001, dtype=torch.float64)
    weight = torch.exp(s - h if of == "data" else h - s)
    for degree in range(3):
        exact = float(torch.trapezoid(weight * s**degree, s))
        weights = plan_weights(places, h, PlanStep(3, of, "all"))
        assert sum(w * at**degree for w, at in zip(weights, places, strict=True)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("kind", SPACES)
def test_least_squares_over_all_answers_come_nearer_than_2m(kind):
    target, exact, levels = problem(kind, 100)
    _, other, _ = problem(kind, 100, 2)
    run, levels6 = fit_olss(target.denoise, levels(6), exact), levels(6)
    far = lambda end, it: float((end - it.end).square().mean().sqrt())
    for it in (exact, other):
        plain = dpmpp_2m(target.denoise, it.states[0], levels6, target.space).end
        assert far(solve_olss(target.denoise, it.states[0], run), it) < far(plain, it)


def test_the_search_finds_the_plan_of_least_error():
    wanted = (PlanStep(3, "noise", "few"), PlanStep(1, "data", "all"))
    asked = []

    def error(plan) -> float:
        asked.append(plan)
        return (plan[0] != 1) + sum(a != b for a, b in zip(plan[1], wanted, strict=True)) * 0.5

    found = search_plan(error, 2, 3, 250, torch.Generator().manual_seed(0))
    assert found == (1, wanted) and len(asked) == len(set(asked)) == 250
    assert [at for at, _ in asked[:3]] == [0, 1, 2]
