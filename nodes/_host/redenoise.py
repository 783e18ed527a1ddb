"""Strong and weak guidance of a running guider, for golden noise without a network and for the zigzag sampler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.golden_noise import mix
from ...kernels.redenoise import (
    Evaluate,
    Mode,
    inversion_stability,
    keep_norm,
    redenoise,
    sample_zigzag,
    turning_level,
)
from .._plan.solvers import SOLVERS
from .clock import noise_space
from .golden_noise import why_not
from .session import Solver, Solves, draw_noises, run_session

LOG = logging.getLogger(__name__)
KEY = "attune.redenoise"


@dataclass(frozen=True)
class Redenoise:
    """strong_cfg 0 is the sampler's own; depth 0 turns at the run's second level. See the kernel for the rest."""

    strong_cfg: float = 0.0
    weak_cfg: float = 1.0
    rounds: int = 1
    strength: float = 1.0
    mode: Mode = "two-step"
    depth: float = 0.39
    evaluate: Evaluate = "next level"
    renormalize: bool = False


class Guided:
    """A guider at another scale: it stands where the guider stands, for samplers and for the inpainting around them."""

    def __init__(self, guider: Any, scale: float):
        self._guider, self._scale = guider, scale
        self.inner_model = guider.inner_model
        self._positive, self._distilled = _with_guidance(guider, scale)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None = None, **_: Any) -> Tensor:
        if self._scale == 0:  # the guider as it is, whatever it mixes
            return self._guider(x, sigma, model_options=model_options, seed=seed)
        negative = self._guider.conds.get("negative")
        scale = 1.0 if self._distilled else self._scale
        return comfy.samplers.sampling_function(
            self.inner_model, x, sigma, negative, self._positive, scale, model_options=model_options, seed=seed
        )


def _with_guidance(guider: Any, scale: float) -> tuple[list, bool]:
    """The positive prompts, and whether their strength is a number that the network is told, as Flux is.

    For such a model without classifier-free guidance of its own, `scale` becomes that number.
    """
    positive = guider.conds["positive"]
    told = any("guidance" in cond.get("model_conds", {}) for cond in positive)
    if not told or (guider.conds.get("negative") and getattr(guider, "cfg", 1.0) != 1.0):
        return positive, False
    number = comfy.conds.CONDRegular(torch.tensor([float(scale)]))
    if scale == 0:
        return positive, True
    return [{**cond, "model_conds": {**cond["model_conds"], "guidance": number}} for cond in positive], True


def guidance_gap(who: str, guider: Any, strong_cfg: float, weak_cfg: float) -> str:
    """What the log says of the two scales; ValueError where they cannot differ."""
    _, distilled = _with_guidance(guider, weak_cfg)
    if not distilled and not guider.conds.get("negative"):
        raise ValueError(
            f"{who}: this guider has no negative conditioning, so strong and weak guidance are the same. Use CFGGuider "
            "or KSampler; for Flux, set the guidance with FluxGuidance."
        )
    strong = strong_cfg or (None if distilled else getattr(guider, "cfg", None))
    if strong is not None and strong <= weak_cfg:
        LOG.warning("%s: strong guidance %g is not above weak %g, which takes guidance away.", who, strong, weak_cfg)
    said = "the sampler's own" if strong is None else f"{strong:g}"
    return f"guidance {said} down, {weak_cfg:g} back"


def with_redenoise(model: Any, settings: Redenoise, partial: bool) -> Any:
    """A clone of MODEL whose runs start from re-denoised noise; MODEL itself at strength 0."""
    if settings.strength == 0:
        return model

    def sampler_sample(
        executor, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs
    ):
        why = why_not(guider.model_patcher, noise, latent_image, sigmas, partial)
        if extra_args["model_options"].get("context_handler") is not None:
            why = "context windows know the run's own noise levels only"
        if why is None:
            full = executor.class_obj.max_denoise(guider, sigmas)
            golden = redenoised(guider, sigmas, extra_args, noise, latent_image, full, settings)
            if denoise_mask is not None:
                golden = noise * (1 - denoise_mask) + golden * denoise_mask
            noise = golden
        else:
            LOG.info("Attune Redenoise: stands aside, %s.", why)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)

    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sampler_sample)
    return clone


def redenoised(
    guider: Any,
    sigmas: Tensor,
    extra_args: dict,
    noise: Tensor,
    latent: Tensor,
    full: bool,
    settings: Redenoise,
    quiet: bool = False,
) -> Tensor:
    """Golden noise for a run of this guider from `sigmas`, float32; `full` as in the host's noise_scaling."""
    noise = noise.float()  # a difference of two denoised latents is more than half precision holds
    sampling = guider.inner_model.model_sampling
    sigma = sigmas[0]
    gap = guidance_gap("Attune Redenoise", guider, settings.strong_cfg, settings.weak_cfg)
    if settings.evaluate == "first level" and noise_space(sampling).kind == "flow":
        raise ValueError(
            "Attune Redenoise: 'first level' is arithmetic of SD and SDXL; this is a flow model. Set 'evaluate_at' to "
            "'next level'."
        )

    def to_state(n: Tensor) -> Tensor:
        return sampling.noise_scaling(sigma, n, latent, full)

    one = torch.ones(1, *[1] * (noise.ndim - 1), device=noise.device)
    none = torch.zeros_like(one)
    unit = float(
        (sampling.noise_scaling(sigma, one, none, full) - sampling.noise_scaling(sigma, none, none, full)).max()
    )
    turn = turning_level(sigmas, settings.depth, unit, float(sampling.sigma_min))
    strong, weak = (_denoiser(Guided(guider, scale), extra_args) for scale in (settings.strong_cfg, settings.weak_cfg))
    golden = redenoise(
        strong, weak, noise, to_state, unit, sigma, turn, settings.rounds, settings.mode, settings.evaluate
    )
    if settings.renormalize:
        golden = keep_norm(noise, golden)
    if quiet:
        return mix(noise, golden, settings.strength)
    change = (golden - noise).square().mean().sqrt() / noise.square().mean().sqrt()
    LOG.info(
        "Attune Redenoise: %s, sigma %.4g to %.4g and back, %d x 2 calls of the model; changed the noise by %.3g of "
        "its size at strength %g.",
        gap, float(sigma), float(turn), settings.rounds, float(change), settings.strength,
    )  # fmt: skip
    return mix(noise, golden, settings.strength)


def _denoiser(guided: Any, extra_args: dict):
    """x, sigma [] -> denoised, interruptible, by a guider with the options of the run."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = {key: extra_args[key] for key in ("model_options", "seed", "denoise_mask") if key in extra_args}
        with torch.no_grad():
            return guided(x, sigma.expand(len(x)).to(x), **options)

    return denoise


def zigzag_sampler(zigzag_steps: int, strong_cfg: float, weak_cfg: float, rounds: int) -> Any:
    """A SAMPLER: Euler's method with zigzags before its first steps."""

    @torch.no_grad()
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        inpainting, extra_args = model, extra_args or {}
        if zigzag_steps:
            LOG.info(
                "Attune Zigzag Sampler: %s; %d of %d steps.",
                guidance_gap("Attune Zigzag Sampler", inpainting.inner_model, strong_cfg, weak_cfg),
                min(zigzag_steps, int((sigmas[1:] > 0).sum())), len(sigmas) - 1,
            )  # fmt: skip
        strong = _denoiser(_inpainting(inpainting, strong_cfg) if strong_cfg else inpainting, extra_args)
        weak = _denoiser(_inpainting(inpainting, weak_cfg), extra_args)
        for i, state, denoised, x_next in sample_zigzag(strong, weak, x, sigmas, zigzag_steps, rounds):
            if callback is not None:
                callback({"x": state, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = x_next
        return x

    sample.__name__ = "sample_attune_zigzag"
    return comfy.samplers.KSAMPLER(sample)


def _inpainting(around: Any, scale: float) -> Any:
    """The host's mask handling around the guider at another scale."""
    other = comfy.samplers.KSamplerX0Inpaint(Guided(around.inner_model, scale), around.sigmas)
    other.latent_image, other.noise = around.latent_image, around.noise
    return other


@dataclass(frozen=True)
class ChosenNoise:
    """A NOISE: one draw for each sample of the latent that it was chosen for."""

    seed: int
    noise: Tensor

    def generate_noise(self, input_latent: dict) -> Tensor:
        wanted, have = tuple(input_latent["samples"].shape), tuple(self.noise.shape)
        if wanted != have:
            raise ValueError(
                f"Attune Select Noise chose noise for latents of {have}, but the sampler got {wanted}. Give "
                "both the same latent."
            )
        return self.noise.clone()


def select_noise(
    model: Any, positive: list, negative: list, cfg: float, latent: Tensor, seed: int, candidates: int, steps: int
) -> tuple[ChosenNoise, Tensor]:
    """For each sample the draw of `seed`, `seed` + 1, … that survives inversion best; and all scores [candidates b]."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "sgm_uniform", steps + 1)[:-1]
    noises = torch.stack(draw_noises(latent, seed, candidates))  # [candidates b c h w]
    euler = Solver("euler", "euler", comfy.samplers.ksampler("euler"), SOLVERS["euler"])

    def work(solves: Solves) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.expand(len(x))
            return solves.denoise(x, level, level)

        unit = sampling.noise_scaling(sigmas[0], torch.ones(1), torch.zeros(1), False)
        return torch.stack([inversion_stability(denoise, unit.cpu() * n.float(), sigmas.float().cpu()) for n in noises])

    space = noise_space(sampling)
    scores = run_session(model, positive, negative, cfg, euler, sigmas, torch.zeros_like(latent), seed, space, work)
    best = scores.argmax(dim=0)
    return ChosenNoise(seed, noises[best, torch.arange(len(latent))]), scores
