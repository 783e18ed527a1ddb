"""The table of solvers against the host's own samplers: calls, noise and order."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pack.nodes._plan.solvers import SOLVERS, table_name

NEWER = {"exp_heun_2_x0", "exp_heun_2_x0_sde"}  # of hosts that are newer than the oldest we run on
ADAPTIVE = {"dpm_adaptive"}  # asks until it is content: no number of calls
SINGLE = {"uni_pc", "uni_pc_bh2"}  # which take no float64
CANCELS = {"ipndm_v"}  # its errors of third order are larger than those of its first steps on a Gaussian
TOP, LOW, SPREAD = 10.0, 0.1, 1.0  # of the levels; standard deviation of the clean latents


class Answers:
    """A guided MODEL in the eyes of a sampler; `answer(x, sigma)` is the denoised latent. calls: how often it was asked."""

    def __init__(self, answer):
        import comfy.model_base
        import comfy.supported_models

        config = comfy.supported_models.SD15({**comfy.supported_models.SD15.unet_config})
        sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.EPS)
        self.answer, self.levels = answer, []
        self.inner_model = SimpleNamespace(model_sampling=sampling)
        self.model_patcher = SimpleNamespace(get_model_object=lambda _: sampling, model=self)
        self.cfg = 1.0  # newer hosts put it into their log

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.levels.append(float(sigma[0]))
        denoised = self.answer(x, sigma.reshape(-1, 1, 1, 1))
        for post in (model_options or {}).get("sampler_post_cfg_function", []):
            both = dict.fromkeys(("denoised", "cond_denoised", "uncond_denoised"), denoised)
            denoised = post({**both, "model_options": model_options, "sigma": sigma, "input": x})
        return denoised


def levels(name: str, steps: int) -> torch.Tensor:
    dtype = torch.float32 if name in SINGLE else torch.float64
    return torch.logspace(math.log10(TOP), math.log10(LOW), steps + 1, dtype=torch.float64).to(dtype)


def start(sigmas: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return noise.to(sigmas)


def run(name: str, answer, steps: int = 19, seed: int = 3):
    """The end of a run of the host's sampler from TOP to LOW, and the model that it asked."""
    import comfy.samplers

    model, sigmas = Answers(answer), levels(name, steps)
    noise = start(sigmas)
    extra = {"model_options": {}, "seed": seed, "denoise_mask": None}
    sampler = comfy.samplers.sampler_object(name)
    return sampler.sample(model, sigmas.clone(), extra, None, noise, torch.zeros_like(noise), None, True), model


def exact(x, sigma):
    """The denoiser of clean latents ~ N(0, SPREAD^2)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def error(name: str, steps: int) -> float:
    """Of the end, to where the exact path leads."""
    end, _ = run(name, exact, steps)
    there = TOP * start(end) * math.sqrt((SPREAD**2 + LOW**2) / (SPREAD**2 + TOP**2))
    return float((end - there).norm())


def listed() -> list[str]:
    import comfy.samplers

    return list(comfy.samplers.KSampler.SAMPLERS)


def of_host(name: str) -> None:
    if name not in listed():
        assert name in NEWER
        pytest.skip("this host lacks it")


def test_every_sampler_of_the_host_is_in_the_table(host):
    assert {table_name(name) for name in listed()} >= SOLVERS.keys() - NEWER
    assert {table_name(name) for name in listed()} <= SOLVERS.keys() >= NEWER


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - ADAPTIVE))
def test_the_model_is_asked_as_often_and_where_the_table_says(host, name):
    of_host(name)
    facts, (_, model) = SOLVERS[name], run(name, exact)
    most = facts.calls * (19 // facts.calls if facts.own_levels else 19)
    assert most - 2 * facts.calls <= len(model.levels) <= most + 1
    if facts.on_grid:
        assert model.levels == pytest.approx(levels(name, 19)[:-1].tolist(), rel=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_those_that_add_noise_are_known_and_their_siblings_add_none(host, name):
    of_host(name)
    facts, ends = SOLVERS[name], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(run(name, exact, seed=seed)[0])
    assert torch.equal(*ends) != facts.adds_noise
    if facts.sibling:
        assert not SOLVERS[facts.sibling].adds_noise and not SOLVERS[facts.sibling].own_levels


@pytest.mark.parametrize("name", [name for name, one in SOLVERS.items() if not one.adds_noise and not one.own_levels])
def test_the_order_is_the_one_of_the_table(host, name):
    of_host(name)
    steps = (40, 80) if name in SINGLE else (160, 320)
    coarse, fine = (error(name, n) for n in steps)
    slope = math.log2(coarse / fine)
    assert slope > SOLVERS[name].order - 0.1 and (slope < SOLVERS[name].order + 0.5 or name in CANCELS)


def test_a_sampler_that_the_table_does_not_know_is_refused_by_a_fit_and_counts_as_adding_noise(host, demo, monkeypatch):
    import comfy.k_diffusion.sampling as sampling
    import comfy.samplers

    from pack.nodes._host.session import solver_of
    from pack.nodes._host.solvers import adds_noise, on_grid

    def sample_from_tomorrow(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return x

    monkeypatch.setattr(sampling, "sample_from_tomorrow", sample_from_tomorrow, raising=False)
    new = comfy.samplers.KSAMPLER(sample_from_tomorrow)
    with pytest.raises(ValueError, match=r"^Attune does not know the sampler 'from_tomorrow'. .*choose one of euler, "):
        solver_of(new, demo[0])
    assert adds_noise(new) and not on_grid(new)


def test_options_decide_where_a_solver_can_be_run_with_or_without_noise(host):
    import comfy.samplers

    from pack.nodes._host.solvers import adds_noise

    made = lambda name, **options: adds_noise(comfy.samplers.ksampler(name, options))
    assert [made("euler"), made("euler", s_churn=1.0), made("euler_ancestral"), made("euler_ancestral", eta=0.0)] == [
        False, True, True, False,
    ]  # fmt: skip
