"""The aligned timestep, against its closed form on Gaussian data and exact paths of a mixture."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from analytic import gaussian_alignment
from nightly import daily
from oracles import euler, finish, gaussian, mixture_2d, network, path
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import (
    CALLS_PER_STEP,
    Alignment,
    Trajectory,
    align,
    block_norm,
)
from published import align_published

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
SD = torch.tensor([14.6146, 6.3, 2.7, 1.2, 0.5, 0.2, 0.03, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_the_closed_form_keeps_the_variance_exactly(steps):
    """std_out / std = 1 for data ~ N(0, 1) and an eps network; unaligned Euler loses a third of it in 5 steps."""
    target = gaussian(1.0, VE)
    told = network(target, "eps")
    sigmas = torch.cat(
        [torch.logspace(math.log10(14.6146), math.log10(0.0292), steps, dtype=torch.float64), torch.zeros(1)]
    )
    x = torch.sqrt(1 + sigmas[:1] ** 2)[:, None]
    plain = euler(target.denoise, x, sigmas)
    for sigma, sigma_next in pairwise(sigmas):
        tau = gaussian_alignment(sigma, sigma_next)
        x = x + (sigma_next - sigma) * (x - told(x, sigma, tau)) / sigma
    assert float(x) == pytest.approx(1.0, abs=1e-12)
    assert float(plain) < 0.95


def test_the_closed_form_by_numbers():
    levels = torch.tensor([14.6146412, 1.0, 0.0], dtype=torch.float64)
    got = gaussian_alignment(levels[:-1], levels[1:])
    torch.testing.assert_close(got, torch.tensor([4.14314, 0.45509], dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_fit_finds_the_closed_form():
    target = gaussian(1.0, VE)
    start = math.sqrt(1 + 14.6146**2) * torch.randn(
        64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    fitted, said = finish(align(network(target, "eps"), SD, [path(target, start)], VE))
    want = gaussian_alignment(SD[:-1], SD[1:])
    got = torch.tensor(fitted.sigma_cond, dtype=torch.float64)
    assert (got / want).log().abs()[:3].max() < 0.03  # half the spacing of the finest candidates; later ones make up
    x, heard, told = start, fitted.through(VE), network(target, "eps")
    for sigma, sigma_next in pairwise(SD):
        x = x + (sigma_next - sigma) * (x - told(x, sigma, heard(sigma))) / sigma
    assert block_norm(x) / block_norm(start) * math.sqrt(1 + 14.6146**2) == pytest.approx(1.0, abs=0.01)
    assert block_norm(euler(target.denoise, start, SD)) / block_norm(x) < 0.9
    assert said[-1] == (len(SD) - 1) * CALLS_PER_STEP and said == sorted(said)
    assert min(fitted.gain) > 0.5


@pytest.mark.parametrize(
    ("prediction", "fits"), daily([("eps", 1), ("v", 1), ("eps", 2), ("v", 2)], ("eps", 1), ("v", 2), names=2)
)
def test_alignment_brings_other_noises_of_a_mixture_nearer_to_their_exact_ends(prediction, fits):
    target = mixture_2d(VE)
    told = network(target, prediction)
    noise = torch.randn(3, 128, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 14.65
    fitted, _ = finish(align(told, SD, [path(target, x) for x in noise[:fits]], VE))
    heard = fitted.through(VE)
    x = held = noise[2]
    for sigma, sigma_next in pairwise(SD):
        x = x + (sigma_next - sigma) * (x - told(x, sigma, heard(sigma))) / sigma
    end = path(target, held).end
    aligned, plain = block_norm(x - end), block_norm(euler(target.denoise, held, SD) - end)
    assert aligned < {"eps": 0.4, "v": 0.7}[prediction] * plain


def test_alignment_helps_a_flow_model_and_leaves_its_first_level_alone():
    target = mixture_2d(FLOW)
    sigmas = torch.linspace(1, 0, 9, dtype=torch.float64)
    told = network(target, "flow")
    noise = torch.randn(2, 128, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fitted, said = finish(align(told, sigmas, [path(target, noise[0])], FLOW))
    assert fitted.sigma_cond[0] == 1.0 and said[0] == 1 and said[1] == 2
    heard = fitted.through(FLOW)
    x = noise[1]
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * (x - told(x, sigma, heard(sigma))) / sigma
    end = path(target, noise[1]).end
    assert block_norm(x - end) < 0.7 * block_norm(euler(target.denoise, noise[1], sigmas) - end)


def test_the_published_loss_does_not_tend_to_the_true_level_and_harms_at_twenty_steps():
    """Its minimum inflates the variance by sin(a) / sin(b) a step, however small the steps; ours tends to tau = sigma."""
    target = mixture_2d(VE)
    told = network(target, "eps")
    noise = torch.randn(2, 256, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 14.65
    ratios = {}
    for steps in (5, 20):
        levels = torch.cat(
            [torch.logspace(math.log10(14.6), math.log10(0.03), steps, dtype=torch.float64), torch.zeros(1)]
        )
        theirs, said = finish(align_published(told, levels, [noise[0]], VE))
        ours, _ = finish(align(told, levels, [path(target, noise[0])], VE))
        ratios[steps] = [
            sum(math.log(b / a) for a, b in zip(one.sigma, one.sigma_cond, strict=True)) for one in (theirs, ours)
        ]
        assert said[-1] <= 31 * (steps - 1) and theirs.sigma_cond[-1] == theirs.sigma[-1]
    per_step = {steps: [total / steps for total in both] for steps, both in ratios.items()}  # of ln(tau / sigma)
    assert per_step[20][0] < per_step[5][0] < -0.7 and 0 > per_step[20][1] > 0.6 * per_step[5][1]
    heard, x = theirs.through(VE), noise[1]
    for sigma, sigma_next in pairwise(levels):
        x = x + (sigma_next - sigma) * (x - told(x, sigma, heard(sigma))) / sigma
    end = path(target, noise[1]).end
    assert block_norm(x - end) > 1.5 * block_norm(euler(target.denoise, noise[1], levels) - end)


def test_sequential_and_parallel_agree_on_the_published_loss():
    target = gaussian(1.0, VE)
    generator = torch.Generator().manual_seed(0)
    start = math.sqrt(1 + 14.6146**2) * torch.randn(512, 1, generator=generator, dtype=torch.float64)
    noised = lambda sigma: [math.sqrt(1 + sigma**2) * torch.randn(512, 1, generator=generator, dtype=torch.float64)]
    told = network(target, "eps")
    one, _ = finish(align_published(told, SD, [start], VE))
    other, _ = finish(align_published(told, SD, [start], VE, noised=noised))
    for a, b in zip(one.sigma_cond, other.sigma_cond, strict=True):
        assert abs(math.log(a / b)) < 0.15


def test_no_level_above_the_models_highest_is_told_and_exact_steps_stay_as_they_are():
    still = gaussian(1.0, VE)
    start = torch.ones(4, 1, dtype=torch.float64) * 14.65
    fitted, _ = finish(align(network(still, "eps"), SD, [path(still, start)], VE, highest=2.0))
    assert max(fitted.sigma_cond[2:]) <= 2.0
    exact = lambda x, sigma, told: x - sigma[:, None] * torch.ones_like(x)  # a straight line, whatever is told
    line = Trajectory.recorded(
        SD, [14.65 + s - SD[:1] + torch.zeros(4, 1) for s in SD], [torch.zeros(4, 1).double() + 14.65 - SD[0]] * 7
    )
    unchanged, _ = finish(align(exact, SD, [line], VE))
    assert not unchanged.changes and unchanged.through(VE) is None


def test_a_trajectory_passes_through_its_states_and_is_fourth_order_between_them():
    target = gaussian(0.7, VE)
    start = torch.full((1, 1), 14.6, dtype=torch.float64)
    errors = []
    for n in (20, 40):
        sigmas = torch.cat([torch.logspace(1.16, -1.5, n, dtype=torch.float64), torch.zeros(1)])
        states = [target.flow(start, sigmas[0], sigma) for sigma in sigmas]
        denoised = [target.denoise(x, sigma) for x, sigma in zip(states[:-1], sigmas[:-1], strict=True)]
        one = Trajectory.recorded(sigmas, states, denoised)
        torch.testing.assert_close(one.at(float(sigmas[7])), one.states[7])
        between = (sigmas[:-2] * sigmas[1:-1]).sqrt()
        want = torch.cat([target.flow(start, sigmas[0], s) for s in between])
        got = torch.cat([one.at(float(s)) for s in between])
        errors.append(float((got - want).abs().max()))
    assert errors[1] < errors[0] / 12
    assert torch.equal(one.at(0.0), one.end)


def test_the_block_norm_of_pictures_is_the_mean_norm_of_their_blocks():
    x = torch.zeros(1, 4, 16, 24)
    x[:, :, :8, :8] = 1.0
    assert block_norm(x) == pytest.approx(16 / 6)
    assert block_norm(x[:, :, None]) == pytest.approx(16 / 6)  # a video of one frame
    assert block_norm(torch.ones(1, 4, 9, 8)) == pytest.approx((16 + math.sqrt(32)) / 2)  # a rest is a block too


def test_knots_of_a_flow_leave_out_its_one():
    one = Alignment((1.0, 0.5, 0.2), (1.0, 0.4, 0.2), (0.0, 0.1, 0.0))
    assert one.knots(FLOW) == ((0.2, 0.5), (0.2, 0.4))
