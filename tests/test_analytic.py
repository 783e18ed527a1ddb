"""Exact denoisers against what defines them: the posterior mean, the score, the probability-flow ODE."""

from __future__ import annotations

import pytest
import torch

from analytic import Gaussian, Mixture, PowerLawField, gaussian_kl
from oracles import euler
from pack.kernels.space import NoiseSpace

SPACES = pytest.mark.parametrize("space", [NoiseSpace("ve"), NoiseSpace("flow")], ids=lambda s: s.kind)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def mixture(space):
    return Mixture(
        f64(0.2, 0.5, 0.3), torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.5, -1.5]]).double(), f64(0.3, 0.6, 0.1), space
    )


def all_of(space):
    return [
        Gaussian(f64(0.5, -1.0), f64(0.3, 2.0), space),
        mixture(space),
        PowerLawField(1, 8, space),
    ]


@SPACES
@pytest.mark.parametrize("which", range(3), ids=["gaussian", "mixture", "field"])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9])
def test_no_linear_correction_of_the_denoiser_comes_closer_to_the_clean_latents(space, which, sigma):
    """The posterior mean is the least-squares estimate: its error is uncorrelated with itself and with the input."""
    target, generator = all_of(space)[which], torch.Generator().manual_seed(0)
    x0 = target.sample(40_000 if which < 2 else 4_000, generator)
    s = torch.tensor(sigma, dtype=torch.float64)
    x = space.alpha(s) * x0 + s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    denoised = target.denoise(x, s)
    error = (x0 - denoised).flatten()
    for other in (denoised.flatten(), x.flatten(), torch.ones_like(error)):
        products = error * other
        standard_error = products.std() / len(products) ** 0.5 * (8 if which == 2 else 1.5)
        assert products.mean().abs() < 4 * standard_error


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_the_mixtures_denoiser_is_its_score_by_tweedies_formula(sigma):
    target, s = mixture(NoiseSpace("ve")), torch.tensor(sigma, dtype=torch.float64)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(target.log_density(x, s).sum(), x)
    torch.testing.assert_close(target.denoise(x, s).detach(), x.detach() + s**2 * score, rtol=1e-9, atol=1e-9)


def test_the_mixtures_density_integrates_to_one():
    grid = torch.linspace(-12, 12, 400, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    density = mixture(NoiseSpace("ve")).log_density(x, torch.tensor(0.7, dtype=torch.float64)).exp()
    assert float(density.sum() * (grid[1] - grid[0]) ** 2) == pytest.approx(1, abs=1e-6)


@SPACES
def test_many_euler_steps_arrive_where_the_exact_flow_does(space):
    target = Gaussian(f64(0.5, -1.0), f64(0.3, 2.0), space)
    start, end = (f64(0.95)[0], f64(0.05)[0])
    x0 = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (200, 400):
        x = euler(target.denoise, x0, torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64))
        errors.append(float((x - target.flow(x0, start, end)).abs().max()))
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(2, abs=0.15)  # first order


@SPACES
def test_a_batch_of_noise_levels_equals_one_call_each(space):
    for target in all_of(space):
        x = target.sample(3, torch.Generator().manual_seed(2))
        sigma = f64(0.1, 0.4, 0.8)
        want = torch.cat([target.denoise(x[i : i + 1], sigma[i]) for i in range(3)])
        torch.testing.assert_close(target.denoise(x, sigma), want)


def test_the_field_has_unit_mean_square_and_falling_spectrum():
    field = PowerLawField(2, 16, NoiseSpace("ve"))
    x = field.sample(4000, torch.Generator().manual_seed(0))
    assert float(x.square().mean()) == pytest.approx(1, abs=0.02)
    stds = field.stds()
    assert stds[0, 0] == stds.max() and (stds[0, 1:9].diff() < 0).all()


def test_gaussian_kl_is_zero_only_at_equality_and_matches_the_integral():
    assert float(gaussian_kl(f64(1.3), f64(1.3))) == 0
    p, q = torch.distributions.Normal(0.0, 2.0), torch.distributions.Normal(0.0, 0.7)
    want = float(torch.distributions.kl_divergence(p, q))
    assert float(gaussian_kl(f64(0.7), f64(2.0))) == pytest.approx(want, rel=1e-6)
