"""A MODEL that is an exact denoiser, sampled by the host: closed forms must come out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from analytic import Gaussian
from exact import analytic_model, field, field_scores, gains, levels, mixture, sample, start
from pack.kernels.space import NoiseSpace


def gaussian(space: str, std: float = 1.0) -> Gaussian:
    return Gaussian(torch.zeros((), dtype=torch.float64), torch.tensor(std, dtype=torch.float64), NoiseSpace(space))


@pytest.mark.parametrize("space", ["ve", "flow"])
@pytest.mark.parametrize("make", [gaussian, field, mixture])
def test_the_model_is_the_exact_denoiser_at_every_level(host, space, make):
    target = make(space)
    model = analytic_model(target, 1).model
    for sigma in (model.model_sampling.sigma_min, 0.0301, 0.5, 0.731, model.model_sampling.sigma_max):
        x, sigma = torch.randn(2, 1, 16, 16, generator=torch.manual_seed(0)), torch.as_tensor(float(sigma)).repeat(2)
        exact = model.diffusion_model.denoise(x.double(), sigma.double())
        assert torch.allclose(model.apply_model(x, sigma).double(), exact, atol=2e-5)


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_euler_on_kl_optimal_levels_shrinks_by_the_product_of_cosines(host, steps):
    model = analytic_model(gaussian("ve"))
    sigmas = levels(host, model, "kl_optimal", steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1))
    angles = torch.atan(sigmas.double())
    closed_form = math.prod(math.cos(a - b) for a, b in pairwise(angles.tolist()))
    out = sample(host, model, "euler", sigmas, noise)
    assert torch.allclose(out, noise * closed_form, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("space", ["ve", "flow"])
def test_solvers_keep_their_order_in_the_host(host, space, solver, order):
    target = gaussian(space, 0.5)
    model, noise, errors = analytic_model(target, 1), torch.ones(1, 1, 1, 1), []
    first, last = (8.0, 0.4) if space == "ve" else (0.9, 0.3)
    for steps in (16, 32):
        sigmas = torch.logspace(math.log10(first), math.log10(last), steps + 1)
        begin = start(model, sigmas, noise)
        exact = target.flow(begin, sigmas[:1].double(), sigmas[-1:].double())
        out = sample(host, model, solver, sigmas, noise).double()
        if space == "flow":
            out = out * (1 - last)  # the host hands a run that stops early on as signal, divided by alpha
        errors.append(float((out - exact).abs()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_driving_each_noise_alone_gives_the_spread_of_real_samples(host):
    model = analytic_model(field("ve"), 1)
    sigmas = levels(host, model, "karras", 6)
    spread = gains(host, model, "euler_ancestral", sigmas, 1, 16).square().sum(0).sqrt()
    noise = torch.randn(512, 1, 16, 16, generator=torch.manual_seed(2))
    out = sample(host, model, "euler_ancestral", sigmas, noise)
    drawn = torch.fft.fft2(out.double(), norm="ortho").abs().square().mean((0, 1)).sqrt()
    assert float((drawn / spread - 1).square().mean().sqrt()) < 0.05


def test_many_steps_reach_the_exact_answers(host):
    model = analytic_model(field("ve"), 1)
    few, many = (field_scores(host, model, "dpmpp_2m", levels(host, model, "karras", n)) for n in (10, 80))
    assert many[0] < few[0] / 10 and many[1] < few[1] / 10


def test_a_model_node_applies_to_it(host):
    """A stock MODEL -> MODEL node: guidance rescale at cfg 1 changes nothing, and the levels of SD3 can be shifted."""
    model = analytic_model(gaussian("flow"))
    (shifted,) = host.call("ModelSamplingSD3", model=model, shift=1.0)
    assert float(levels(host, shifted, "simple", 2)[1]) == pytest.approx(0.5, abs=1e-3)
    assert float(levels(host, model, "simple", 2)[1]) == pytest.approx(0.75, abs=1e-3)
