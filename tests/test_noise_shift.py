"""The noise shift, on networks that hear every level wrong by a known amount, on Gaussians, and where nothing is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from nightly import daily
from oracles import finish, gaussian, mixture_2d, mixture_latent, network
from pack.kernels.noise_shift import (
    SHIFT_PRESETS,
    WIDEST,
    Limits,
    Losses,
    ShiftPreset,
    calibration_levels,
    fit_joint,
    joint_shift,
    smoothest,
    spline,
)
from pack.kernels.space import NoiseSpace
from published import fit_per_level

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
LIMITS = {"ve": Limits(0.0292, 14.61), "flow": Limits(0.001, 1.0)}
NORMAL, QUICK = (16, 13, 2), (8, 7, 2)  # levels, candidates, noises


def hears_wrong(target, prediction, kappa):
    """A network that takes each told level for one `kappa` log units higher; kappa may depend on ln(sigma / alpha)."""
    net, space = network(target, prediction), target.space

    def denoise(x, sigma, told):
        at = space.log_ratio(told)
        return net(x, sigma, space.at_log_ratio(at + (kappa(at) if callable(kappa) else kappa)))

    return denoise


def calibrate(fit, target, prediction, kappa, pictures, effort=NORMAL, seed=0):
    x0 = target.sample(pictures, torch.Generator().manual_seed(seed + 100))
    preset, space = ShiftPreset(pictures, *effort), target.space
    return finish(fit(hears_wrong(target, prediction, kappa), x0, preset, space, LIMITS[space.kind], seed))


def errors(shift, space, kappa):
    return torch.tensor(shift.offsets(space)) + kappa


@pytest.mark.parametrize(("prediction", "kappa"), [("eps", 0.262), ("v", -0.223), ("edm", 0.262), ("flow", -0.223)])
def test_an_injected_shift_is_found_where_the_search_level_by_level_errs(prediction, kappa):
    space = FLOW if prediction == "flow" else VE
    target = mixture_latent(space)
    joint, said = calibrate(fit_joint, target, prediction, kappa, 256)
    assert joint.verdict.accepted and joint.verdict.t < joint.verdict.needed < -1.6 and joint.verdict.mean < 0
    inside = errors(joint, space, kappa)[1:-1]  # the outermost are clamped to what the network knows
    assert inside.abs().max() < 0.015 and said[-1][0] == 256 * 16 * 26
    level, said = calibrate(fit_per_level, target, prediction, kappa, 256)
    assert said[-1] <= 256 * 16 * 26
    assert errors(level, space, kappa).abs().max() > 5 * inside.abs().max()


def test_of_independent_pictures_as_large_as_latents_a_quick_fit_finds_the_shift_to_a_few_thousandths():
    """Eight pictures of 64 independent patches of 32 numbers each: 896 evaluations."""
    target = mixture_latent(VE)
    net = hears_wrong(target, "eps", 0.262)

    def denoise(x, sigma, told):
        flat = [level.repeat_interleave(64) for level in (sigma, told)]
        return net(x.reshape(-1, 32), *flat).reshape(x.shape)

    x0 = target.sample(8 * 64, torch.Generator().manual_seed(1)).reshape(8, 64, 32)
    shift, said = finish(fit_joint(denoise, x0, ShiftPreset(8, *QUICK), VE, LIMITS["ve"]))
    assert said[-1][0] == 896 and shift.verdict.accepted
    assert errors(shift, VE, 0.262)[1:].abs().max() < 0.02


def test_a_shift_that_changes_with_the_level_is_followed():
    kappa = lambda at: 0.3 * torch.tanh(at)
    target = mixture_latent(VE)
    shift, _ = calibrate(fit_joint, target, "eps", kappa, 1024)
    told = VE.log_ratio(torch.tensor(shift.sigma_cond).double())
    assert shift.verdict.accepted and shift.penalty < 1e3
    assert (told + kappa(told) - VE.log_ratio(torch.tensor(shift.sigma).double()))[1:-1].abs().max() < 0.12


def test_a_gain_of_less_than_a_percent_is_left_alone_however_sure():
    shift, _ = calibrate(fit_joint, mixture_latent(VE), "eps", 0.08, 1024, QUICK)
    assert shift.verdict.t < 1.5 * shift.verdict.needed and -0.01 < shift.verdict.mean < 0
    assert not shift.verdict.accepted and shift.sigma_cond == shift.sigma


SHIFTS = (0.3, -0.3, 0.45, -0.45)


def kept(seeds, shifts, data=mixture_latent, pictures=(8,)):
    """How many quick fits pass, of networks in turn of all kinds."""
    passed = 0
    for seed in range(seeds):
        space = (VE, FLOW)[seed % 2]
        prediction = "flow" if space is FLOW else ("eps", "v")[seed // 8 % 2]
        kappa, count = shifts[seed // 2 % len(shifts)], pictures[seed % len(pictures)]
        shift, _ = calibrate(fit_joint, data(space), prediction, kappa, count, QUICK, seed)
        passed += shift.verdict.accepted
        assert shift.verdict.accepted or shift.sigma_cond == shift.sigma
        assert shift.verdict.pictures == count
    return passed


@pytest.mark.parametrize(
    ("data", "networks"),
    daily([(mixture_latent, 20), (mixture_latent, 40), (mixture_2d, 40)], (mixture_latent, 20), names=2),
)
def test_of_the_networks_that_hear_right_one_in_twenty_is_changed_at_most(data, networks):
    assert kept(networks, (0.0,), data, (8, 16, 32)) <= networks // 20


@pytest.mark.parametrize(("networks", "least"), daily([(16, 6), (30, 15)], (16, 6), names=2))
def test_half_of_the_networks_that_hear_wrong_are_mended_by_a_quick_fit(networks, least):
    """Eight pictures of 32 numbers each, 0.3 or 0.45 log units up or down; sixteen leave more to chance."""
    assert SHIFT_PRESETS["quick"].evaluations == 896
    assert kept(networks, SHIFTS) >= least


@pytest.mark.parametrize(("std", "sigma", "want"), [(1.4, 0.2, 0.1025), (1.4, 1.0, 0.5439), (1.4, 4.0, 2.319)])
def test_a_model_of_other_spread_gets_the_level_of_equal_gain(std, sigma, want):
    """Model N(0, 1), data N(0, std^2), eps network: the level whose gain equals the data's, in closed form."""
    net = network(gaussian(1.0, VE), "eps")
    x0 = gaussian(std, VE).sample(400000, torch.Generator().manual_seed(0)).reshape(8, 50000)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tried = torch.linspace(-WIDEST, WIDEST, 25, dtype=torch.float64)
    x, level = x0 + sigma * noise, torch.full((8,), sigma, dtype=torch.float64)
    losses = torch.stack([(net(x, level, level * d.exp()) - x0).square().mean(1) for d in tried], 1)[:, None]
    shift = joint_shift(losses, tried, torch.tensor([sigma]).double(), VE, LIMITS["ve"])
    assert shift.verdict.accepted and shift.sigma_cond[0] == pytest.approx(want, rel=0.02)


def test_an_optimum_beyond_the_candidates_stops_at_the_last_one():
    """Data of std 0.7 at sigma 4 and more: no level of the model has a gain so small."""
    net, x0 = network(gaussian(1.0, VE), "eps"), gaussian(0.7, VE).sample(8000, torch.Generator().manual_seed(0))
    limits = Limits(0.03, 1000.0)
    shift, _ = finish(fit_per_level(net, x0.reshape(8, 1000), ShiftPreset(8, 8, 13), VE, limits))
    top = [o for s, o in zip(shift.sigma, shift.offsets(VE), strict=True) if s > 4]
    assert top and min(top) > 0.9 * WIDEST


def test_no_level_is_told_that_the_network_does_not_know():
    target, heard = mixture_latent(VE), []
    net = network(target, "eps")

    def listen(x, sigma, told):
        heard.append(float(told[0]))
        return net(x, sigma, told)

    x0 = target.sample(8, torch.Generator().manual_seed(0))
    finish(fit_joint(listen, x0, ShiftPreset(8, *QUICK), VE, LIMITS["ve"]))
    assert min(heard) >= 0.0292 and max(heard) <= 14.61


def test_the_fit_is_the_same_twice_and_every_candidate_sees_the_same_two_opposite_noises():
    target, seen = mixture_latent(FLOW), {}
    net = network(target, "flow")

    def listen(x, sigma, told):
        seen.setdefault(float(sigma[0]), []).append(x.clone())
        return net(x, sigma, told)

    x0 = target.sample(8, torch.Generator().manual_seed(0))
    one, _ = finish(fit_joint(listen, x0, ShiftPreset(8, *QUICK), FLOW, LIMITS["flow"], seed=5))
    assert len(seen) == 8 and all(torch.equal(x, xs[k % 2]) for xs in seen.values() for k, x in enumerate(xs))
    for sigma, xs in seen.items():
        torch.testing.assert_close((xs[0] + xs[1]) / 2, (1 - sigma) * x0)
    first, second = (xs[0] for xs in list(seen.values())[:2])
    assert not torch.equal(first, second)
    other, _ = finish(fit_joint(net, x0, ShiftPreset(8, *QUICK), FLOW, LIMITS["flow"], seed=5))
    assert one == other


def test_the_smoothest_path_is_the_one_of_brute_force():
    losses = torch.rand(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid = torch.linspace(-1, 1, 6, dtype=torch.float64)
    for mu in (0.0, 0.3, 10.0):
        every = torch.cartesian_prod(*[torch.arange(6)] * 4)  # [6^4 4]
        cost = losses[torch.arange(4), every].sum(1) + mu * grid[every].diff(dim=1).square().sum(1)
        assert smoothest(losses, grid, mu).tolist() == every[cost.argmin()].tolist()


def test_the_spline_passes_through_its_knots_and_keeps_cubics():
    knots, at = torch.linspace(-1.2, 1.2, 13, dtype=torch.float64), torch.linspace(-1.2, 1.2, 101, dtype=torch.float64)
    cubic = lambda t: 1 - t + 2 * t**2 - 3 * t**3
    torch.testing.assert_close(spline(knots, at) @ cubic(knots), cubic(at), rtol=0, atol=1e-12)
    torch.testing.assert_close(spline(knots, knots), torch.eye(13, dtype=torch.float64), rtol=0, atol=1e-12)


def test_levels_lie_inside_what_the_network_knows():
    for space, ends in ((VE, LIMITS["ve"]), (FLOW, LIMITS["flow"]), (VE, Limits(0.002, 80.0))):
        levels = calibration_levels(8, space, ends)
        assert len(levels) == 8 and bool((levels.diff() > 0).all())
        assert ends.lowest < levels[0] and levels[-1] < ends.highest
        steps = space.log_ratio(levels).diff()
        torch.testing.assert_close(steps, steps[:1].expand(7))
    assert math.isclose(float(calibration_levels(16, FLOW, LIMITS["flow"])[-1]), 1 / (1 + math.exp(-3)))


def test_too_few_pictures_are_refused_before_the_first_call():
    never = lambda *_: pytest.fail("the network was called")
    with pytest.raises(ValueError, match="at least 6 pictures, but there are 3"):
        next(fit_joint(never, torch.zeros(3, 4), ShiftPreset(3, *QUICK), VE, LIMITS["ve"]))


def test_pictures_are_noised_at_the_scale_that_the_model_was_trained_on():
    """8 times the pictures in 8 times the noise, seen by a network that divides by 8: 64 times every loss."""
    target, limits, sigmas = mixture_latent(FLOW), LIMITS["flow"], torch.tensor([0.3, 0.6], dtype=torch.float64)
    net, x0 = hears_wrong(target, "flow", 0.262), target.sample(8, torch.Generator().manual_seed(1))
    plain = Losses(net, x0, sigmas, FLOW, limits, 0, 2)
    loud = Losses(lambda x, *of: 8 * net(x / 8, *of), 8 * x0, sigmas, NoiseSpace("flow", 8.0), limits, 0, 2)
    for i, offset in ((0, 0.0), (1, -0.4)):
        torch.testing.assert_close(loud.losses(i, offset), 64 * plain.losses(i, offset), rtol=1e-5, atol=0)
