"""The KL-optimal schedule, against exact Gaussian targets: Euler's output spread is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from oracles import end_std, finish, gaussian
from pack.kernels.ays import kl_optimal
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace
from published import KlubNoise, klub_gaussian, klub_interval, klub_optimal_gaussian, minimise_klub, subdivided

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
SPACES = pytest.mark.parametrize(("space", "first"), [(VE, 14.6146), (FLOW, 1.0)], ids=["ve", "flow"])


@SPACES
@pytest.mark.parametrize("c", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 20])
def test_each_step_multiplies_the_spread_by_the_cosine_of_its_angle(space, first, c, steps):
    sigmas = kl_optimal(steps, first, space, c)
    angle = float(space.angle(torch.tensor(first, dtype=torch.float64), c))
    want = c * math.cos(angle / steps) ** steps
    assert end_std(gaussian(c, space), sigmas) == pytest.approx(want, rel=1e-9, abs=1e-12)


@SPACES
def test_no_neighbouring_schedule_keeps_more_of_the_spread(space, first):
    target = gaussian(1.0, space)
    best = kl_optimal(6, first, space)
    top = end_std(target, best)
    for i in range(1, 6):
        for factor in (0.97, 1.03):
            other = best.clone()
            other[i] *= factor
            assert end_std(target, check_sigmas(other)) < top


def test_flow_levels_of_eight_steps():
    want = [1, 0.834089, 0.707107, 0.599456, 0.5, 0.400544, 0.292893, 0.165911, 0]
    torch.testing.assert_close(kl_optimal(8, 1.0, FLOW), torch.tensor(want, dtype=torch.float64), rtol=0, atol=5e-7)
    assert end_std(gaussian(1.0, FLOW), kl_optimal(8, 1.0, FLOW)) == pytest.approx(0.856232, abs=5e-7)


def test_a_smaller_spread_puts_more_steps_at_low_noise():
    low, high = (kl_optimal(10, 14.6, VE, c) for c in (0.5, 1.4))
    assert (low[1:-1] < high[1:-1]).all()


@SPACES
def test_one_step_goes_from_the_first_level_to_zero(space, first):
    assert kl_optimal(1, first, space).tolist() == [first, 0.0]


@SPACES
@pytest.mark.parametrize("steps", [1, 3, 50, 1000])
def test_it_starts_exactly_at_the_first_level_and_ends_exactly_at_zero(space, first, steps):
    sigmas = check_sigmas(kl_optimal(steps, first, space))
    assert len(sigmas) == steps + 1 and float(sigmas[0]) == first and float(sigmas[-1]) == 0.0


@pytest.mark.parametrize(("steps", "first", "c", "words"), [(0, 1.0, 1.0, "at least 1 step"), (3, -1.0, 1.0, "sigma_max = -1"), (3, 1.0, 0.0, "c = 0")])  # fmt: skip
def test_impossible_settings_are_refused(steps, first, c, words):
    with pytest.raises(ValueError, match=words):
        kl_optimal(steps, first, VE, c)


KLUB_5 = [14.614641, 0.565415, 0.250306, 0.120659, 0.0592, 0.029167]


def estimate(sigmas, data, target, seed=0, c=0.5):
    noise = torch.Generator().manual_seed(seed)
    return sum(
        klub_interval(target.denoise, data, low, high, KlubNoise.draw(data, noise), c)
        for high, low in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False)
    )


def test_the_minimum_of_the_bound_by_numbers():
    got = klub_optimal_gaussian(5, 0.029167, 14.614641)
    torch.testing.assert_close(got, torch.tensor(KLUB_5, dtype=torch.float64), rtol=2e-5, atol=0)
    ten = klub_optimal_gaussian(10, 0.029167, 14.614641)
    arctan = VE.at_angle(torch.linspace(float(VE.angle(ten[0])), float(VE.angle(ten[-1])), 11, dtype=torch.float64))
    assert float(klub_gaussian(ten)) == pytest.approx(1.60, abs=5e-3)
    assert float(klub_gaussian(arctan)) == pytest.approx(16.7, abs=0.05)


@pytest.mark.parametrize("std", [0.5, 1.0, 1.4])
def test_the_estimate_is_the_closed_form_of_the_bound(std):
    target = gaussian(std, VE)
    data = target.sample(4096, torch.Generator().manual_seed(1))
    for sigmas in (torch.tensor(KLUB_5), torch.tensor([14.6, 1.0, 0.03])):
        assert estimate(sigmas, data, target) == pytest.approx(float(klub_gaussian(sigmas, std)), rel=0.06)


def test_on_its_own_gaussian_the_integrand_is_constant_up_to_the_draw_of_the_noise():
    """Lemma 3.3: with data of the density's c, the mean square over the weight does not depend on t."""
    target = gaussian(0.5, VE)
    data = target.sample(20000, torch.Generator().manual_seed(2))
    for low, high in ((0.03, 1.0), (1.0, 14.6), (0.2, 0.3)):
        noise = KlubNoise.draw(data, torch.Generator().manual_seed(3))
        want = float(klub_gaussian(torch.tensor([high, low]), 0.5))
        assert klub_interval(target.denoise, data, low, high, noise) == pytest.approx(want, rel=0.04)


def test_the_normaliser_puts_the_middle_level_where_the_bound_has_its_minimum():
    """Without it every level looks the same on data of the density's own c."""
    target = gaussian(1.0, VE)
    data = target.sample(4096, torch.Generator().manual_seed(4))
    levels = torch.logspace(math.log10(0.05), 0.5, 41, dtype=torch.float64).tolist()
    noise = [KlubNoise.draw(data, torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    bound = lambda level: sum(
        klub_interval(target.denoise, data, low, high, one)
        for (low, high), one in zip(((level, 14.61), (0.0292, level)), noise, strict=True)
    )
    exact = float(klub_optimal_gaussian(2, 0.0292, 14.61)[1])
    assert min(levels, key=bound) == pytest.approx(exact, rel=0.12)


def test_the_optimiser_finds_the_minimum_of_the_bound():
    target = gaussian(1.0, VE)
    data = target.sample(1024, torch.Generator().manual_seed(7))
    start = torch.logspace(math.log10(14.614641), math.log10(0.029167), 6, dtype=torch.float64)
    got, said = finish(minimise_klub(target.denoise, data, start, torch.Generator().manual_seed(8), sweeps=12))
    assert (
        float(klub_gaussian(got))
        < 1.02 * float(klub_gaussian(torch.tensor(KLUB_5)))
        < 0.98 * float(klub_gaussian(start))
    )
    assert got[0] == start[0] and got[-1] == start[-1] and 0 < len([sweep for sweep in said if sweep]) <= 12


def test_it_stops_early_at_the_sweep_with_the_least_held_out_error():
    """The spread that Euler loses is least for the closed form; the bound leads away from it."""
    target = gaussian(1.0, VE)
    data = target.sample(256, torch.Generator().manual_seed(9))
    start = kl_optimal(6, 14.614641, VE)[:-1]
    lost = lambda sigmas: 1 - end_std(target, torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]))
    got, said = finish(minimise_klub(target.denoise, data, start, torch.Generator().manual_seed(8), lost))
    assert lost(got) == min(lost(start), *(sweep.error for sweep in said if sweep)) <= lost(start)
    assert len([sweep for sweep in said if sweep]) < 6


def test_subdivision_keeps_the_old_levels_and_moves_only_the_new():
    target = gaussian(1.0, VE)
    start = torch.tensor([14.6, 1.0, 0.03], dtype=torch.float64)
    finer, new = subdivided(start)
    assert torch.equal(finer[::2], start) and new == [1, 3]
    torch.testing.assert_close(finer[1::2], torch.tensor([14.6**0.5, 0.03**0.5], dtype=torch.float64))
    data = target.sample(128, torch.Generator().manual_seed(1))
    got, _ = finish(minimise_klub(target.denoise, data, finer, torch.Generator().manual_seed(2), free=new))
    assert torch.equal(got[::2], start) and not torch.equal(got, finer)
    check_sigmas(got)


def test_the_bound_refuses_a_level_of_zero():
    with pytest.raises(ValueError, match="append the final 0 afterwards"):
        next(minimise_klub(lambda x, s: x, torch.zeros(1, 1), torch.tensor([1.0, 0.5, 0.0]), torch.Generator()))


def test_noise_of_another_scale_has_the_schedule_of_smaller_data():
    """HiDream-O1 was trained on noise of scale 8."""
    torch.testing.assert_close(kl_optimal(8, 1.0, NoiseSpace("flow", 8.0), 4.0), kl_optimal(8, 1.0, FLOW, 0.5))
