"""Zigzags against closed forms: point masses, Gaussians, mixtures, and the published arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from analytic import Gaussian
from pack.kernels.redenoise import (
    direct,
    keep_norm,
    redenoise,
    sample_zigzag,
    turning_level,
    zigzag,
)
from pack.kernels.space import NoiseSpace

SPACES = [NoiseSpace("ve"), NoiseSpace("flow")]


def level(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def states(n: int = 5, d: int = 3) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at(point: float):
    """The denoiser of one known picture."""
    return lambda x, sigma: torch.full_like(x, point)


@pytest.mark.parametrize(("sigma", "turn"), [(14.6, 7.8), (1.0, 0.6), (0.9, 0.001)])
def test_between_two_known_pictures_the_zigzag_moves_by_their_difference(sigma, turn):
    x = states()
    moved = zigzag(at(1.5), at(-0.5), x, level(sigma), level(turn))
    torch.testing.assert_close(moved - x, torch.full_like(x, (sigma / turn - 1) * 2.0))
    moved = direct(at(1.5), at(-0.5), x, level(sigma), level(turn))
    torch.testing.assert_close(moved - x, torch.full_like(x, (1 - turn / sigma) * 2.0))


@pytest.mark.parametrize("space", SPACES, ids=["ve", "flow"])
def test_between_two_gaussians_the_zigzag_is_a_closed_form(space):
    def slope_and_offset(mean: float, std: float, s: float) -> tuple[float, float]:
        """(x - denoised) / sigma = slope * x + offset."""
        alpha = float(space.alpha(level(s)))
        gain = alpha * std**2 / (alpha**2 * std**2 + s**2)
        return (1 - gain) / s, -(mean - gain * alpha * mean) / s

    strong, weak = (Gaussian(level(m)[None], level(s)[None], space) for m, s in ((1.0, 0.4), (0.2, 0.8)))
    s0, s1 = 0.95, 0.5
    a, b = slope_and_offset(1.0, 0.4, s0)
    c, d = slope_and_offset(0.2, 0.8, s1)
    x = states(7, 1)
    down = x + (s1 - s0) * (a * x + b)
    want = down + (s0 - s1) * (c * down + d)
    torch.testing.assert_close(zigzag(strong.denoise, weak.denoise, x, level(s0), level(s1)), want)


@pytest.mark.parametrize("space", SPACES, ids=["ve", "flow"])
def test_with_equal_guidance_the_way_back_errs_to_second_order(space):
    target, x = oracles.mixture_2d(space), states(64, 2)
    errors = []
    for h in (0.02, 0.01):
        back = zigzag(target.denoise, target.denoise, x, level(0.8), level(0.8 - h))
        errors.append(float((back - x).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    assert torch.equal(direct(target.denoise, target.denoise, x, level(0.8), level(0.5)), x)


@pytest.mark.parametrize("space", SPACES, ids=["ve", "flow"])
def test_direct_is_the_first_order_of_the_zigzag(space):
    strong, weak, x = oracles.mixture_2d(space), Gaussian(level(0.0), torch.ones(2).double(), space), states(64, 2)
    errors = []
    for h in (0.02, 0.01):
        ends = (f(strong.denoise, weak.denoise, x, level(0.8), level(0.8 - h)) for f in (zigzag, direct))
        errors.append(float(torch.sub(*ends).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_direct_is_linear_in_the_guidance_gap():
    x, cond, uncond = states(), at(1.0), at(-1.0)

    def guided(scale: float):
        return lambda x, sigma: uncond(x, sigma) + scale * (cond(x, sigma) - uncond(x, sigma))

    one, two = (direct(guided(1 + gap), guided(1.0), x, level(14.6), level(7.8)) - x for gap in (1.0, 2.0))
    torch.testing.assert_close(2 * one, two)


@pytest.mark.parametrize("betas", [(14.6, 7.84), (6.0, 2.0)])
def test_the_first_level_is_the_published_ddim_arithmetic(betas):
    s0, s1 = map(level, betas)
    strong, weak = oracles.gaussian(0.5, SPACES[0]), oracles.gaussian(0.9, SPACES[0])
    ab0, ab1 = 1 / (1 + s0**2), 1 / (1 + s1**2)  # alpha_bar of the two levels
    z = states(7, 1)

    def eps(target, z, t):  # a network on variance-preserving states, told level t
        return (z * (1 + t**2).sqrt() - target.denoise(z * (1 + t**2).sqrt(), t)) / t

    e = eps(strong, z, s0)
    z1 = ab1.sqrt() * (z - (1 - ab0).sqrt() * e) / ab0.sqrt() + (1 - ab1).sqrt() * e
    e = eps(weak, z1, s0)  # the published inversion tells the first level
    want = ab0.sqrt() * (z1 - (1 - ab1).sqrt() * e) / ab1.sqrt() + (1 - ab0).sqrt() * e
    x = z * (1 + s0**2).sqrt()
    found = zigzag(strong.denoise, weak.denoise, x, s0, s1, "first level")
    torch.testing.assert_close(found / (1 + s0**2).sqrt(), want)


def test_the_published_strength_is_the_depth():
    s0, s1 = level(14.61), level(7.84)
    x, unit = states(), (1 + s0**2).sqrt()
    eps_strong, eps_weak = 0.3, -0.2
    strong, weak = ((lambda x, sigma, e=e: x - sigma * e) for e in (eps_strong, eps_weak))
    noise = x / unit
    golden = redenoise(strong, weak, noise, lambda n: n * unit, float(unit), s0, s1)
    torch.testing.assert_close(golden - noise, torch.full_like(x, float((s0 - s1) / unit) * (eps_weak - eps_strong)))
    assert float((s0 - s1) / unit) == pytest.approx(0.462, abs=1e-3)


@pytest.mark.parametrize("mode", ["two-step", "direct"])
def test_noise_scaled_again_is_the_state_that_was_reached(mode):
    strong, weak, noise = at(1.0), at(0.2), states()
    state = lambda n: 3 * n + 0.7
    golden = redenoise(strong, weak, noise, state, 3.0, level(3.0), level(1.0), mode=mode)
    step = zigzag if mode == "two-step" else direct
    torch.testing.assert_close(state(golden), step(strong, weak, state(noise), level(3.0), level(1.0)))
    twice = redenoise(strong, weak, noise, state, 3.0, level(3.0), level(1.0), rounds=2, mode=mode)
    torch.testing.assert_close(twice, redenoise(strong, weak, golden, state, 3.0, level(3.0), level(1.0), mode=mode))


def test_the_turning_level_is_the_runs_own_or_a_depth():
    sigmas = torch.tensor([14.0, 7.0, 0.0])
    assert float(turning_level(sigmas, 0, 14.0, 0.03)) == 7
    assert float(turning_level(sigmas, 0.5, 14.0, 0.03)) == 7
    assert float(turning_level(sigmas, 2.0, 14.0, 0.03)) == pytest.approx(0.03)
    assert float(turning_level(sigmas[1:], 0, 7.0, 0.03)) == pytest.approx(0.03)
    assert float(turning_level(torch.tensor([0.02, 0.0]), 0, 0.02, 0.03)) < 0.02


def test_a_kept_norm_is_each_samples_own():
    a, b = states(3), states(3) * torch.tensor([[1.0], [2.0], [5.0]]) + 0.1
    torch.testing.assert_close(keep_norm(a, b).norm(dim=1), a.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(keep_norm(a, b), b), torch.ones(3).double())


@pytest.mark.parametrize("space", SPACES, ids=["ve", "flow"])
def test_without_zigzags_the_sampler_is_euler(space):
    target, sigmas, x = oracles.mixture_2d(space), level(0.9) * torch.linspace(1, 0, 6).double(), states(8, 2)
    *_, (i, _, _, end) = sample_zigzag(target.denoise, target.denoise, x, sigmas, 0)
    assert i == 4
    torch.testing.assert_close(end, oracles.euler(target.denoise, x, sigmas))


def test_every_zigzag_costs_two_evaluations_and_the_last_step_none():
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma))
        return 0.5 * x

    sigmas = torch.tensor([3.0, 2.0, 1.0, 0.0])
    list(sample_zigzag(counted, counted, states(), sigmas, 10, rounds=2))
    assert calls == [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1]
    calls.clear()
    list(sample_zigzag(counted, counted, states(), sigmas, 1))
    assert calls == [3, 2, 3, 2, 1]


def test_zigzags_with_stronger_guidance_end_nearer_to_the_prompt():
    # The prompt's mode is one of a mixture; plain sampling from noise in between ends in either.
    space = SPACES[0]
    both = oracles.mixture_1d(space)
    one = Gaussian(both.means[2], both.stds[2].reshape(1), space)
    sigmas = torch.cat([torch.linspace(10, 0.1, 20), torch.zeros(1)]).double()
    strong = lambda x, sigma: both.denoise(x, sigma) + 0.5 * (one.denoise(x, sigma) - both.denoise(x, sigma))
    x = 10 * states(200, 1)
    (*_, (_, _, _, plain)), (*_, (_, _, _, zig)) = (
        list(sample_zigzag(strong, both.denoise, x, sigmas, steps)) for steps in (0, 19)
    )
    assert float((zig - 1.5).abs().mean()) < 0.85 * float((plain - 1.5).abs().mean())
