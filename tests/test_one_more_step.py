"""One More Step in numbers: the authors' step, the exact toy model that loses its brightness, the leak, the training."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from analytic import SharedLevel, euler_gain
from oracles import euler, fine_levels
from pack.kernels.one_more_step import SignalLeak, clean_of_v, first_state, guided, keyed_noise, noise_for, v_loss
from pack.kernels.space import NoiseSpace
from pack.models.train_one_more_step import ModuleTraining

KNOWN = json.loads((Path(__file__).parent / "data" / "one_more_step.json").read_text("utf-8"))
STEP = KNOWN["one_step"]
SIGMA_MAX = 14.6146411895752
TOY = SharedLevel(torch.tensor([0.9, -0.6, 0.3, -1.1], dtype=torch.float64)[:, None, None], 0.8, 0.5)
SHAPE = (64, 4, 64, 64)


def step_inputs(omega: float):
    noise = torch.tensor(STEP["eps"], dtype=torch.float64).reshape(1, 4, 1, 4)
    cond, uncond = (
        torch.tensor(STEP[f"v_{name}_per_channel"], dtype=torch.float64)[None, :, None, None]
        for name in ("cond", "uncond")
    )
    return noise, guided(clean_of_v(cond), clean_of_v(uncond), omega)


@pytest.mark.parametrize("case", STEP["cases"], ids=lambda c: f"{c['level']} {c['omega']} {c['sigma0']:.4g}")
def test_one_step_is_the_references(case):
    noise, x0 = step_inputs(case["omega"])
    sigma = case["sigma0"]
    state = first_state(x0, noise, sigma, case["level"])
    torch.testing.assert_close(state.flatten(), torch.tensor(case["state"], dtype=torch.float64), rtol=0, atol=1e-6)
    scale = math.sqrt(1 + sigma**2) if case["max_denoise"] else sigma
    found = noise_for(state, noise, scale).flatten()
    torch.testing.assert_close(found, torch.tensor(case["noise"], dtype=torch.float64), rtol=0, atol=1e-7)


def test_mask_latent_and_strength_are_the_references():
    case = STEP["mask_latent_strength"]
    noise, x0 = step_inputs(case["omega"])
    sigma, mask = case["sigma0"], torch.tensor(case["mask"])
    found = noise_for(
        first_state(x0, noise, sigma), noise, math.sqrt(1 + sigma**2), case["latent"], mask, case["strength"]
    )
    torch.testing.assert_close(found.flatten(), torch.tensor(case["noise"], dtype=torch.float64), rtol=0, atol=1e-7)


def test_strength_0_is_the_noise_to_the_bit_and_1_begins_at_the_state():
    noise, x0 = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    state, latent = first_state(x0, noise, 5.0), torch.randn(2, 4, 8, 8)
    assert torch.equal(noise_for(state, noise, 5.0, latent, strength=0.0), noise)
    torch.testing.assert_close(5.0 * noise_for(state, noise, 5.0, latent) + latent, state)
    assert torch.equal(noise_for(state, noise, 5.0, latent, torch.zeros(2, 1, 8, 8)), noise)


def test_the_first_state_varies_as_noise_and_prediction_do_together():
    """Var = sigma^2 + Var(x0); linear in x0; and with ever more noise there is nothing left to correct."""
    generator = torch.Generator().manual_seed(3)
    noise, x0 = torch.randn(2, 200_000, dtype=torch.float64, generator=generator)
    assert float(first_state(0.7 * x0, noise, 2.0).var()) == pytest.approx(2.0**2 + 0.7**2, rel=0.01)
    twice = 2 * first_state(x0, noise, 2.0) - first_state(0 * x0, noise, 2.0)
    torch.testing.assert_close(first_state(2 * x0, noise, 2.0), twice)
    for sigma in (14.6, 120.0, 4518.8):
        found = noise_for(first_state(x0, noise, sigma), noise, math.sqrt(1 + sigma**2))
        assert bool(((found - noise).abs() <= x0.abs() / sigma + noise.abs() / (2 * sigma**2) + 1e-12).all())


def test_the_official_level_is_the_posterior_of_the_authors_code():
    """sqrt(a) x0 + (1 - a) z in variance-preserving units, for every first noise level; the exact one has the root."""
    noise, x0 = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(1, 4, 2, 2, dtype=torch.float64)
    for sigma in (SIGMA_MAX, 13.1204, 11.0283, 2.0):
        a = 1 / (1 + sigma**2)
        official = math.sqrt(a) * x0 + (1 - a) * noise
        exact = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
        torch.testing.assert_close(math.sqrt(a) * first_state(x0, noise, sigma, "official"), official)
        torch.testing.assert_close(math.sqrt(a) * first_state(x0, noise, sigma), exact)


def test_guidance_0_is_without_the_prompt_and_1_with_it():
    cond, uncond = torch.randn(2, 1, 4, 2, 2)
    assert torch.equal(guided(cond, uncond, 0.0), uncond)
    assert torch.equal(guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 3.0), uncond + 3 * (cond - uncond))


def test_keyed_noise_is_the_same_tomorrow_anywhere_in_a_batch_and_moves_no_random_state():
    """The drawn numbers are those of the first run: a workflow must draw its picture again."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = keyed_noise(noise)
    first = [[0.2532327, 0.3908452, 0.2124438], [0.0399592, -0.2811457, 0.6807852], [1.1999899, 0.9759815, -0.3743935]]
    torch.testing.assert_close(found.flatten(1)[:, :3], torch.tensor(first), rtol=0, atol=1e-5)
    assert torch.equal(keyed_noise(noise[1:2]), found[1:2])
    assert torch.equal(torch.random.get_rng_state(), before)
    other = keyed_noise(noise, "leak")
    assert abs(float((other * found).mean())) < 0.1 and not torch.equal(other, found)


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 64, 64), (16, 3, 20, 20)])
def test_keyed_noise_hears_no_rounding_error_and_tells_noises_apart(shape):
    """randn differs by an ulp between processors, and by more next to 0."""
    noise = torch.randn(100, *shape, generator=torch.Generator().manual_seed(1))
    noise[0, ..., 0] = 0.0
    found = keyed_noise(noise)
    for end in (math.inf, -math.inf):
        assert torch.equal(keyed_noise(torch.nextafter(noise, torch.tensor(end))), found)
    away = 1e-7 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(keyed_noise(noise + away), found)
    assert torch.equal(keyed_noise(torch.where(noise == 0, -0.0, noise)), found)
    drawn = torch.cat([found, keyed_noise(-noise), keyed_noise(noise.flip(-1)), keyed_noise(noise, "leak")]).flatten(1)
    assert len(drawn.unique(dim=0)) == 400
    half = torch.where(torch.arange(shape[-1]) < shape[-1] // 2, noise[:1], noise[1:])
    assert len(keyed_noise(half).flatten(1).unique(dim=0)) == 99


def sampled(start, steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and where Euler ends from start(noise), on the levels of `simple` in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    sigma = (1 / torch.cumprod(1 - betas, 0) - 1).sqrt()
    sigmas = torch.cat([sigma[[-1 - int(i * 1000 / steps) for i in range(steps)]], torch.zeros(1)])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sigmas, euler(TOY.denoise, start(noise, float(sigmas[0])), sigmas)


def test_plain_sampling_keeps_a_tenth_of_the_brightness_and_one_more_step_all_of_it():
    sigmas, plain = sampled(lambda noise, s: math.sqrt(1 + s**2) * noise)
    level = TOY.variances(64 * 64)[0]
    lost = float(euler_gain(level, sigmas))
    assert lost == pytest.approx(0.8993533, abs=1e-6)
    assert float(euler_gain(TOY.std**2, sigmas)) == pytest.approx(0.0500811, abs=1e-6)
    _, ours = sampled(lambda noise, s: first_state(TOY.mean, noise, s))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = lambda x: x.mean((2, 3), keepdim=True)
    # Without sampling error: both are linear in the noise.
    kept = shared(plain) - lost * math.sqrt(1 + float(sigmas[0]) ** 2) * shared(noise)
    torch.testing.assert_close(kept, (1 - lost) * TOY.mean.expand_as(kept), rtol=0, atol=1e-9)
    whole = shared(ours) - lost * float(sigmas[0]) * shared(noise)
    torch.testing.assert_close(whole, TOY.mean.expand_as(whole), rtol=0, atol=1e-9)


def test_the_leak_brings_back_the_spread_that_the_mean_cannot():
    """The limit of many steps, exactly: pixels and level both end with the variance of the data."""
    small = SharedLevel(TOY.mean, 0.8, 0.5)
    h = w = 8
    level, pixel = small.variances(h * w)
    d = 4 * 9
    amplitude = torch.full((d,), pixel / (h * w), dtype=torch.float64)
    amplitude[::9] = level / (h * w)
    leak = SignalLeak(torch.zeros(4, 3, 3), torch.diag(amplitude.sqrt()), torch.full((4,), 0.8))
    white, noise = torch.randn(2, 1500, 4, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = fine_levels(NoiseSpace("ve"), 150)
    sigmas = sigmas[sigmas < h * w / 35]  # where the level leaks as in 64 x 64 latents at SD's highest noise
    ends = {}
    for name, x0 in (("mean", small.mean), ("both", small.mean + leak.residual(white))):
        ends[name] = euler(small.denoise, first_state(x0, noise, float(sigmas[0])), sigmas)
    spread = {name: float(x.mean((2, 3)).std(0).mean()) for name, x in ends.items()}
    wanted = math.sqrt(level / (h * w))
    lost = float(euler_gain(level, sigmas))
    assert spread["mean"] == pytest.approx(lost * float(sigmas[0]) / math.sqrt(h * w), rel=0.03)
    assert spread["mean"] < 0.5 * wanted < spread["both"]
    assert spread["both"] == pytest.approx(wanted, rel=0.03)
    pixels = (ends["both"] - ends["both"].mean((2, 3), keepdim=True)).square().mean()
    assert float(pixels) == pytest.approx(pixel * (1 - 1 / (h * w)), rel=0.03)
    for x in ends.values():
        torch.testing.assert_close(x.mean((0, 2, 3)), small.mean.flatten(), rtol=0, atol=0.04)


def test_a_fitted_leak_has_the_examples_own_mean_and_covariance():
    generator = torch.Generator().manual_seed(2)
    examples = TOY.sample((40, 4, 6, 10), generator)
    leak = SignalLeak.fit(examples, 2)
    torch.testing.assert_close(leak.mean[:, 0, 0], examples.mean((0, 2, 3)).float(), rtol=1e-5, atol=1e-6)
    covariance = torch.cov(examples.mean((2, 3)).T).float()
    lowest = [4 * c for c in range(4)]
    torch.testing.assert_close((leak.root @ leak.root.T)[lowest][:, lowest], covariance, rtol=1e-4, atol=1e-6)
    white = torch.randn(20000, 4, 6, 10, generator=generator)
    drawn = leak.residual(white)
    torch.testing.assert_close(torch.cov(drawn.mean((2, 3)).T), covariance, rtol=0.1, atol=0.02)
    torch.testing.assert_close(leak.mean_latent(6, 10).mean((2, 3))[0], leak.mean[:, 0, 0])


def test_a_leak_of_white_noise_is_white_noise():
    leak = SignalLeak(torch.zeros(4, 3, 3), torch.eye(36) * 0.8 / math.sqrt(8 * 5), torch.full((4,), 0.8))
    white = torch.randn(2, 4, 8, 5)
    torch.testing.assert_close(leak.residual(white), 0.8 * white, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [4, 16])
def test_the_spread_above_the_low_waves_is_that_of_exact_white_noise(side):
    """4,000 pictures in which every wave has exactly the same variance: the fit has no chance to scatter."""
    n, pixels = 4000, side * side
    basis = torch.linalg.qr(torch.randn(n, pixels, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]  # orthonormal columns of mean 0: sample covariance 1 / (n - 1)
    white = 0.7 * math.sqrt(n - 1) * basis.reshape(n, 1, side, side)
    for frequencies in (1, 3):
        assert float(SignalLeak.fit(white, frequencies).rest) == pytest.approx(0.7, rel=1e-5)


def test_what_no_leak_can_be_fitted_to_or_drawn_at_is_said():
    with pytest.raises(ValueError, match="at least 2 example latents"):
        SignalLeak.fit(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="2 latent pixels has no 3 frequencies"):
        SignalLeak.fit(torch.zeros(4, 4, 2, 8))
    with pytest.raises(ValueError, match="has 4 channels, but the latent has 16"):
        SignalLeak.fit(torch.randn(4, 4, 8, 8)).residual(torch.randn(1, 16, 8, 8))


class Lookup(nn.Module):
    """The least network that can learn a mean per condition."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(3, 4 * 4 * 4, bias=False)

    def forward(self, x, context):
        return self.table(context[:, 0]).reshape(x.shape) + 0 * x


def training_of(steps: int, **more) -> ModuleTraining:
    """A training of Lookup on `examples`, the same each time."""
    torch.manual_seed(0)
    made = {"data": "examples", "steps": steps} | more
    return ModuleTraining(Lookup(), examples, made, steps, learning_rate=0.05, warm_up=10)


def learnt(state, steps: int, stop: int | None = None) -> ModuleTraining:
    training = training_of(steps)
    with contextlib.closing(training.run(state, every=100)) as taken:
        for step in taken:
            if step == stop:
                break
    return training


MEANS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(7))


def examples(generator):
    kind = torch.randint(3, (24,), generator=generator)
    return MEANS[kind] + 0.6 * torch.randn(24, 4, 4, 4, generator=generator), torch.eye(3)[kind][:, None]


def test_training_reaches_the_conditional_mean_and_the_floor_of_its_loss(tmp_path):
    training = learnt(tmp_path / "state", 400)
    found = clean_of_v(training.result()(torch.zeros(3, 4, 4, 4), torch.eye(3)[:, None]))
    assert float((found - MEANS).detach().square().mean().sqrt()) < 0.06
    assert sum(training.losses[-50:]) / 50 == pytest.approx(0.36, rel=0.1)
    assert float(v_loss(lambda z, c: -MEANS, MEANS, torch.eye(3), MEANS)) == 0


def test_a_continued_training_is_one_that_never_stopped(tmp_path):
    whole = learnt(tmp_path / "whole", 40)
    assert learnt(tmp_path / "state", 40, stop=15).step == 15
    second = learnt(tmp_path / "state", 40)
    assert second.losses == whole.losses
    assert torch.equal(second.kept["table.weight"], whole.kept["table.weight"])


def test_what_a_step_draws_says_nothing_about_its_noise():
    """From one generator that goes on: begun anew, the noise would be a function of the pictures that were drawn."""
    training, seen = training_of(40), []
    training.draw = lambda generator: (seen.append(generator.get_state()), examples(generator))[1]
    told = []
    training.network.forward, plain = lambda x, c: (told.append(x), plain(x, c))[1], training.network.forward
    training.learn()
    again = torch.Generator()
    again.set_state(seen[0])
    assert not torch.equal(told[0], torch.randn(told[0].shape, generator=again))
