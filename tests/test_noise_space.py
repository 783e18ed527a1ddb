"""Inversion, replay, edits and morphs against closed forms: point masses, Gaussians, mixtures, the published arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import oracles
from analytic import Gaussian
from pack.kernels.noise_space import (
    NoiseMaps,
    ancestral_step,
    at_level,
    blended,
    check_alike,
    focus_mask,
    invert,
    morph_state,
    morphed,
    sample_replay,
    shifted,
    varied,
)
from pack.kernels.space import NoiseSpace

VE, FLOW = NoiseSpace("ve"), NoiseSpace("flow")
SIGMAS = {
    "ve": torch.tensor([14.6, 5.0, 2.2, 1.0, 0.4, 0.1, 0.0], dtype=torch.float64),
    "flow": torch.tensor([1.0, 0.93, 0.8, 0.6, 0.35, 0.1, 0.0], dtype=torch.float64),
}
both_spaces = pytest.mark.parametrize("space", [VE, FLOW], ids=["ve", "flow"])


def draws(like: Tensor, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def a_picture(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inverted(
    denoise, picture: Tensor, space: NoiseSpace, eta=1.0, dtype=torch.float64, sigmas=None, seed=0
) -> NoiseMaps:
    levels = SIGMAS[space.kind] if sigmas is None else sigmas
    work = invert(denoise, picture, levels, eta, space, draws(picture, seed), dtype)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def replayed(denoise, maps: NoiseMaps, start: int = 0, **more) -> Tensor:
    *_, (_, _, _, x) = sample_replay(denoise, maps, maps.states[start].to(maps.picture), start, **more)
    return x


def at(point: float):
    """The denoiser of one known picture."""
    return lambda x, sigma: torch.full_like(x, point)


def a_mixture(space: NoiseSpace):
    return oracles.mixture_1d(space).denoise


def test_noise_of_another_scale_makes_the_same_maps_of_states_that_are_as_much_farther():
    """HiDream-O1 is trained on noise of scale 8. A known picture: what is left beside it is noise alone."""
    loud, picture = NoiseSpace("flow", 8.0), torch.full((1, 2, 4, 4), 0.3, dtype=torch.float64)
    plain, other = (inverted(at(0.3), picture, space) for space in (FLOW, loud))
    torch.testing.assert_close(other.maps, plain.maps)
    left = [maps.states - (1 - SIGMAS["flow"][:-1])[:, None, None, None, None] * picture for maps in (plain, other)]
    torch.testing.assert_close(left[1], 8 * left[0])
    ends = [morph_state((one.states[2], one.states[2]), (picture, picture), 0.5, one.sigmas[2], one.space, clip=math.inf)
            for one in (plain, other)]  # fmt: skip
    sizes = [((1 - 0.8) ** 2 + (0.8 * space.scale) ** 2) ** 0.5 for space in (FLOW, loud)]
    assert float(ends[1].std()) / sizes[1] == pytest.approx(float(ends[0].std()) / sizes[0], rel=0.05)


# --- the step ---


@both_spaces
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_keeps_the_noise_at_its_level(space, eta):
    """Of x = alpha x0 + sigma eps, with x0 known, x' = alpha' x0 + noise of variance sigma'^2."""
    for sigma, sigma_next in pairwise(SIGMAS[space.kind].tolist()):
        step = ancestral_step(sigma, sigma_next, eta, space)
        alpha, alpha_next = (float(space.alpha(torch.tensor(s, dtype=torch.float64))) for s in (sigma, sigma_next))
        assert step.keep * alpha + step.pull == pytest.approx(alpha_next)
        added = step.unit if eta and sigma_next else 0.0
        assert (step.keep * sigma) ** 2 + added**2 == pytest.approx(sigma_next**2, abs=1e-12)


def test_eta_zero_is_eulers_step():
    for space in (VE, FLOW):
        step = ancestral_step(0.8, 0.5, 0.0, space)
        assert (step.keep, step.pull, step.unit) == pytest.approx((0.5 / 0.8, 1 - 0.5 / 0.8, 1.0))


# --- inversion and replay ---


@both_spaces
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["whole", "half"])
def test_a_replay_gives_the_picture_back(space, eta, dtype):
    """Exactly, from any level and in any precision of the maps."""
    denoise, picture = a_mixture(space), a_picture(200, 1)
    maps = inverted(denoise, picture, space, eta, dtype)
    for start in range(maps.steps):
        torch.testing.assert_close(replayed(denoise, maps, start), picture, rtol=0, atol=1e-12)


@both_spaces
def test_guidance_beyond_what_any_data_have_is_inverted_as_well(space):
    one, other = a_mixture(space), at(0.3)
    strong = lambda x, sigma: other(x, sigma) + 7.5 * (one(x, sigma) - other(x, sigma))
    picture = a_picture(200, 1)
    maps = inverted(strong, picture, space)
    torch.testing.assert_close(replayed(strong, maps), picture, rtol=0, atol=1e-10)
    assert (replayed(one, maps) - picture).abs().max() > 0.1


@both_spaces
def test_the_maps_of_a_known_picture_are_a_closed_form(space):
    """Where the model knows the picture, z joins the two draws: z = (sigma' eps' - keep sigma eps) / unit."""
    picture, sigmas = torch.full((1, 40000), 0.7, dtype=torch.float64), SIGMAS[space.kind]
    maps, draw = inverted(at(0.7), picture, space), draws(picture)
    eps = [draw() for _ in sigmas[:-1]]
    units, keeps = [], []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1].tolist())):
        step = ancestral_step(sigma, sigma_next, 1.0, space)
        x = maps.states[i]  # whose noise is the draw: the next state is the one that was aimed at
        torch.testing.assert_close(x, at_level(picture, eps[i], sigmas[i], space))
        torch.testing.assert_close(maps.maps[i], (sigma_next * eps[i + 1] - step.keep * sigma * eps[i]) / step.unit)
        units.append(step.unit)
        keeps.append(step.keep * sigma)
    for i, z in enumerate(maps.maps):
        want = math.sqrt(float(sigmas[i + 1]) ** 2 + keeps[i] ** 2) / units[i]
        assert float(z.std()) == pytest.approx(want, rel=0.02) and want > 1
    neighbours = torch.corrcoef(maps.maps[2:4, 0])[0, 1]
    assert neighbours < -0.1  # as the paper finds: two maps share a draw, with opposite signs
    torch.testing.assert_close(maps.residual, torch.zeros_like(picture), rtol=0, atol=1e-12)


@both_spaces
@pytest.mark.parametrize("start", [0, 3, 5])
def test_another_known_picture_takes_the_first_ones_place(space, start):
    """The edit is linear in what the model says: a picture wholly of the other prompt's, with the first one's detail."""
    picture = a_picture(3, 4)
    maps = inverted(at(0.2), picture, space)
    torch.testing.assert_close(replayed(at(1.0), maps, start), picture + 0.8)
    torch.testing.assert_close(replayed(at(1.0), maps, start, detail=0.0), torch.full_like(picture, 1.0))


@both_spaces
def test_ddim_inversion_follows_the_exact_flow_of_a_gaussian(space):
    std = torch.tensor([0.3, 1.5], dtype=torch.float64)
    target, picture = Gaussian(torch.tensor([0.5, -1.0]).double(), std, space), a_picture(5, 2)
    first = {"ve": 10.0, "flow": 0.99}[space.kind]
    sigmas = torch.cat([torch.linspace(first, 0.01, 400), torch.zeros(1)]).double()
    maps = inverted(target.denoise, picture, space, eta=0.0, sigmas=sigmas)
    exact = target.flow(picture, torch.tensor(1e-9).double(), sigmas[0])
    torch.testing.assert_close(maps.states[0], exact, rtol=0.03, atol=0.03 * first)
    torch.testing.assert_close(replayed(target.denoise, maps), picture, rtol=0, atol=1e-12)


def test_what_half_precision_cannot_hold_is_said_before_the_first_call():
    def never(x, sigma):
        raise AssertionError

    sigmas = torch.tensor([1e6, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"too large for float16.*Keep the maps in float32"):
        inverted(never, a_picture(1, 4), VE, dtype=torch.float16, sigmas=sigmas)


# --- edits ---


@both_spaces
def test_a_mask_keeps_the_picture_exactly_and_lets_the_rest_go(space):
    picture, free = a_picture(2, 6), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    maps = inverted(at(0.2), picture, space)
    out = replayed(at(1.0), maps, 1, mask=lambda i, denoised: free)
    torch.testing.assert_close(out[:, :3], picture[:, :3] + 0.8)
    assert torch.equal(out[:, 3:], picture[:, 3:])


@both_spaces
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 0.05)])
def test_what_the_model_said_is_in_the_maps(space, dtype, tolerance):
    """Which is what an automatic mask compares with, without another call."""
    denoise, picture = a_mixture(space), a_picture(50, 1)
    maps = inverted(denoise, picture, space, dtype=dtype)
    for i, sigma in enumerate(maps.sigmas[:-1]):
        want = denoise(maps.states[i].to(picture), sigma)
        torch.testing.assert_close(maps.denoised(i, picture), want, rtol=0, atol=tolerance)


@both_spaces
def test_the_focus_keeps_the_picture_where_the_prompts_agree(space):
    """The other prompt wants 0.8 more on the left, and 0.08 more on the right: a tenth of its largest change."""
    picture = a_picture(2, 3, 8, 8)
    more = torch.full((8,), 0.08, dtype=torch.float64)
    more[:4] = 0.8
    maps, other = inverted(at(0.2), picture, space), lambda x, sigma: 0.2 + more.expand_as(x)

    def focused(share: float) -> Tensor:
        return replayed(other, maps, 1, mask=lambda i, denoised: focus_mask(denoised, maps.denoised(i, picture), share))

    out = focused(0.5)
    assert torch.equal(out[..., 5:], picture[..., 5:])
    torch.testing.assert_close(out[..., :3], picture[..., :3] + 0.8)
    torch.testing.assert_close(focused(0.05), picture + more)


@both_spaces
def test_a_variation_ends_in_the_noise_that_its_level_has(space):
    """Where the model knows the picture: the noise of each state has the variance sigma^2, or at half the amount less."""
    picture = torch.full((1, 40000), 0.2, dtype=torch.float64)
    maps = inverted(at(0.2), picture, space)
    assert varied(maps, 0.0, 0, draws(picture)) is maps
    whole = varied(maps, 1.0, 2, draws(picture, 5))
    assert torch.equal(whole.maps[:2], maps.maps[:2]) and float(whole.maps[2:].std()) == pytest.approx(1, rel=0.02)
    for amount, least in ((1.0, 0.98), (0.6, 0.8)):
        runs = sample_replay(at(0.2), varied(maps, amount, 2, draws(picture, 5)), maps.states[0], 0)
        for i, x, _, _ in runs:
            size = float((x - space.alpha(maps.sigmas[i]) * picture).std()) / float(maps.sigmas[i])
            assert least <= size <= 1.02, (amount, i)
    with pytest.raises(ValueError, match=r"eta 0 hold no noise to vary.*'eta' above 0"):
        varied(inverted(at(0.2), picture, space, eta=0.0), 0.5, 0, draws(picture))


@both_spaces
def test_moved_and_flipped_maps_give_the_moved_picture(space):
    denoise, picture = (lambda x, sigma: 0.5 * x), a_picture(2, 3, 4, 5)
    maps = inverted(denoise, picture, space)
    torch.testing.assert_close(replayed(denoise, shifted(maps, 1, -2)), picture.roll((1, -2), (-2, -1)))
    torch.testing.assert_close(replayed(denoise, shifted(maps, flip=[-1])), picture.flip(-1))
    assert shifted(maps) is maps


@both_spaces
def test_two_pictures_blend_by_a_mask(space):
    denoise = lambda x, sigma: 0.5 * x
    one, other = (inverted(denoise, a_picture(1, 20000, seed=seed), space, seed=seed) for seed in (1, 2))
    half = torch.zeros(20000, dtype=torch.float64)
    half[10000:] = 1
    out = replayed(denoise, blended(one, other, half))
    torch.testing.assert_close(out[:, :10000], one.picture[:, :10000])
    torch.testing.assert_close(out[:, 10000:], other.picture[:, 10000:])
    between = blended(one, other, torch.full((1,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(between.picture, (one.picture + other.picture) / 2)
    assert float(between.maps[3].std()) == pytest.approx(float(one.maps[3].std()), rel=0.05)


def test_maps_that_do_not_go_together_are_told_apart():
    one = inverted(at(0.2), a_picture(1, 4), VE)
    with pytest.raises(ValueError, match=r"latents of \[4\], the other of \[5\]"):
        check_alike(one, inverted(at(0.2), a_picture(1, 5), VE))
    with pytest.raises(ValueError, match="different noise levels"):
        check_alike(one, inverted(at(0.2), a_picture(1, 4), VE, sigmas=SIGMAS["ve"][1:]))
    with pytest.raises(ValueError, match=r"'eta' 1 and 0\.5 do not mix"):
        check_alike(one, inverted(at(0.2), a_picture(1, 4), VE, eta=0.5))
    two = inverted(at(0.2), a_picture(2, 4), VE)
    with pytest.raises(ValueError, match="hold 2 and 1"):
        morphed(two, one, [0.5])


# --- morph ---


def published_morph(l1, l2, x1, x2, f, g, boost, k, m, eps, c=2.0):
    """NoiseDiffusion's arithmetic on variance-preserving latents, as the paper states it."""
    ratio = math.cos(f * math.pi / 2) / math.sin(f * math.pi / 2)
    a = math.sqrt((1 - g**2) * ratio**2 / (ratio**2 + 1))
    b = math.sqrt((1 - g**2) / (ratio**2 + 1))
    mu, nu = boost * a / (a + b), boost * b / (a + b)
    y = a * l1.clamp(-c, c) + b * l2.clamp(-c, c) + (mu - a) * k * x1 + (nu - b) * k * x2 + g * m * eps
    brightness = (boost - 1) / boost * (mu * x1 + nu * x2).mean(-1, keepdim=True)  # ours: it is not boosted
    return (y - k * brightness).clamp(-c, c)


@both_spaces
@pytest.mark.parametrize(("f", "g"), [(0.25, 0.0), (0.5, 0.4), (0.9, 0.2)])
def test_a_morph_is_the_published_arithmetic_but_for_the_brightness(space, f, g):
    sigma = torch.tensor(0.8 if space.kind == "flow" else 3.0, dtype=torch.float64)
    x1, x2, e1, e2, eps = (a_picture(2, 50, seed=seed) for seed in range(5))
    states = at_level(x1, e1, sigma, space), at_level(x2, e2, sigma, space)
    n = float((space.alpha(sigma) ** 2 + sigma**2).sqrt())
    k, m = float(space.alpha(sigma)) / n, float(sigma) / n
    want = n * published_morph(states[0] / n, states[1] / n, x1, x2, f, g, 1.2, k, m, eps)
    torch.testing.assert_close(morph_state(states, (x1, x2), f, sigma, space, 1.2, eps, g), want)


def test_the_boost_of_a_morph_raises_contrast_and_no_brightness():
    x1, x2 = (a_picture(1, 3, 400, seed=seed) / 4 + shift for seed, shift in ((1, 0.2), (2, 0.4)))
    sigma = torch.tensor(1e-3, dtype=torch.float64)
    plain, boosted = (morph_state((x1, x2), (x1, x2), 0.5, sigma, VE, boost) for boost in (1.0, 1.4))
    torch.testing.assert_close(plain, (x1 + x2) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(boosted.mean(-1), plain.mean(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(boosted.std(-1), 1.4 * plain.std(-1), rtol=1e-4, atol=0)


@both_spaces
def test_the_ends_of_a_morph_are_the_pictures(space):
    denoise = a_mixture(space)
    one, other = (inverted(denoise, a_picture(1, 1, seed=seed), space, seed=seed) for seed in (1, 2))
    for start in (0, 2, 5):
        frames = morphed(one, other, [0.0, 0.3, 0.7, 1.0], start)
        assert frames.steps == one.steps - start and len(frames.picture) == 4
        out = replayed(denoise, frames)
        torch.testing.assert_close(out[[0, 3]], torch.cat([one.picture, other.picture]), rtol=0, atol=1e-12)
        assert out.isfinite().all()


def test_a_morph_stays_of_the_size_that_the_level_has():
    """With one encoding a quarter too hot, and the other a fifth too cold."""
    sigma = torch.tensor(5.0, dtype=torch.float64)
    x1, x2, e1, e2 = (a_picture(4, 5000, seed=seed) for seed in range(4))
    hot, cold = at_level(x1, 1.25 * e1, sigma, VE), at_level(x2, 0.8 * e2, sigma, VE)
    for f in (0.1, 0.3, 0.5, 0.7, 0.9):
        size = float(morph_state((hot, cold), (x1, x2), f, sigma, VE).std()) / math.sqrt(1 + 25)
        assert 0.8 < size < 1.12
