"""Strong and weak guidance of a running guider: re-denoised noise as a start, the zigzag sampler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ...kernels import redenoise as kernel
from ...kernels.golden_noise import mix
from ...kernels.types import Denoiser
from .clock import noise_space
from .identity import noise_scale, takes_latents_unscaled
from .start import Start, StartingRun

LOG = logging.getLogger(__name__)
WHO = "Attune Redenoise"


@dataclass(frozen=True)
class Redenoise(Start):
    """strong_cfg 0 is the sampler's own; depth 0 turns at the run's second level. See the kernel for the rest.

    partial: also where a run starts from a picture.
    """

    strong_cfg: float = 0.0
    weak_cfg: float = 1.0
    rounds: int = 1
    strength: float = 1.0
    mode: kernel.Mode = "two-step"
    depth: float = 0.39
    evaluate: kernel.Evaluate = "next level"
    renormalize: bool = False
    partial: bool = False
    who = WHO
    place = "re-denoise"

    def check(self, positive: list | None) -> None:
        if not positive:
            raise ValueError(
                f"{WHO} calls the model, which needs prompts: connect those of the guider to 'positive' and 'negative' "
                "of Attune Noise, too."
            )

    def objection(self, run: StartingRun) -> str | None:
        if run.extra_args["model_options"].get("context_handler") is not None:
            return "context windows know the run's own noise levels only"
        if takes_latents_unscaled(run.sampling):
            return "this model's latents are those of its own sampler, which adds the noise in its own way"
        one = torch.ones(1, device=run.sigmas.device)
        alike = torch.equal(*(run.sampling.noise_scaling(run.sigmas[0], n, one, run.top) for n in (one, 2 * one)))
        return "this model starts from a picture, without noise" if alike else None

    def begin(self, run: StartingRun) -> tuple[Tensor, str]:
        """Golden noise, float32."""
        noise, sigma = run.noise.float(), run.sigmas[0]  # half precision is too coarse for a difference of two denoised
        gap = guidance_gap(run.guider, self.strong_cfg, self.weak_cfg)
        if self.evaluate == "first level" and noise_space(run.sampling).kind == "flow":
            raise ValueError(
                f"{WHO}: 'first level' is for SD and SDXL alone, but this is a flow model. Set 'evaluate_at' to "
                "'next level'."
            )

        def to_state(n: Tensor, latent: Tensor = run.latent) -> Tensor:
            return run.sampling.noise_scaling(sigma, n, latent, run.top)

        one = torch.ones(1, *[1] * (noise.ndim - 1), device=noise.device)
        none = torch.zeros_like(one)
        unit = float((to_state(one, none) - to_state(none, none)).max())
        turn = kernel.turning_level(
            run.sigmas, self.depth, unit / noise_scale(run.sampling), float(run.sampling.sigma_min)
        )
        strong, weak = (
            _denoiser(run.guider, run.guider, scale, run.extra_args) for scale in (self.strong_cfg, self.weak_cfg)
        )
        golden = kernel.redenoise(
            strong, weak, noise, to_state, unit, sigma, turn, self.rounds, self.mode, self.evaluate
        )  # fmt: skip
        if self.renormalize:
            golden = kernel.keep_norm(noise, golden)
        change = float((golden - noise).square().mean().sqrt() / noise.square().mean().sqrt())
        golden = mix(noise, golden, self.strength)
        return golden if run.mask is None else run.noise * (1 - run.mask) + golden * run.mask, (
            f"{gap}, sigma {float(sigma):.4g} to {float(turn):.4g} and back, {self.rounds} x 2 evaluations; "
            f"changed the noise by {change:.3g} of its size at strength {self.strength:g}"
        )


@contextmanager
def guidance(guider: Any, scale: float) -> Iterator[None]:
    """The guider at another scale for everyone who calls it in the block; 0 is the guider as it is, whatever it mixes.

    So masks stay, and whatever another pack's wrapper of the sampler does around the guider.
    """
    if scale == 0:
        yield
        return
    positive, distilled = _with_guidance(guider, scale)
    negative, used = guider.conds.get("negative"), 1.0 if distilled else scale

    def predict(x: Tensor, sigma: Tensor, model_options: dict, seed: int | None = None) -> Tensor:
        return comfy.samplers.sampling_function(
            guider.inner_model, x, sigma, negative, positive, used, model_options=model_options, seed=seed
        )

    guider.outer_predict_noise = predict  # of this guider alone, which lives as long as the run
    try:
        yield
    finally:
        del guider.outer_predict_noise


def guider_of(denoise: Any) -> Any:
    """The guider behind what a sampler is given: the host's masking, or another pack's function around it."""
    found = denoise
    while found is not None and not hasattr(found, "conds"):
        found = getattr(found, "inner_model", None)
    if found is None:
        raise ValueError(
            f"{WHO}: another node wraps its SAMPLER and hides the guider, and with it the guidance. Connect the "
            f"sampler of {WHO} to SamplerCustom or SamplerCustomAdvanced without that node."
        )
    return found


def _with_guidance(guider: Any, scale: float) -> tuple[list, bool]:
    """The positive prompts, and whether their strength is a number that the network is told, as Flux is.

    For such a model without classifier-free guidance of its own, `scale` becomes that number.
    """
    positive = guider.conds["positive"]
    told = any("guidance" in cond.get("model_conds", {}) for cond in positive)
    if not told or (guider.conds.get("negative") and getattr(guider, "cfg", 1.0) != 1.0):
        return positive, False
    number = comfy.conds.CONDRegular(torch.tensor([float(scale)]))
    return [{**cond, "model_conds": {**cond["model_conds"], "guidance": number}} for cond in positive], True


def guidance_gap(guider: Any, strong_cfg: float, weak_cfg: float) -> str:
    """What the log says of the two scales; ValueError where they cannot differ."""
    _, distilled = _with_guidance(guider, weak_cfg)
    if not distilled and not guider.conds.get("negative"):
        raise ValueError(
            f"{WHO}: this guider has no negative conditioning, so strong and weak guidance are the same. Use CFGGuider "
            "or KSampler. With Attune Noise, connect 'negative'. For Flux, set the guidance with FluxGuidance."
        )
    strong = strong_cfg or (None if distilled else getattr(guider, "cfg", None))
    if strong is not None and strong <= weak_cfg:
        LOG.warning("%s: strong guidance %g is not above weak %g, which takes guidance away.", WHO, strong, weak_cfg)
    said = "the sampler's own" if strong is None else f"{strong:g}"
    return f"guidance {said} down, {weak_cfg:g} back"


def _denoiser(denoise: Any, guider: Any, scale: float, extra_args: dict) -> Denoiser:
    """x, sigma [] -> denoised, interruptible: what `denoise` says while the guider behind it has another scale."""

    def at_scale(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.no_grad(), guidance(guider, scale):
            return denoise(x, sigma.expand(len(x)).to(x), **extra_args)

    return at_scale


def zigzag_sampler(zigzag_steps: int, strong_cfg: float, weak_cfg: float, rounds: int) -> Any:
    """A SAMPLER: Euler's method with zigzags before its first steps."""

    @torch.no_grad()
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        guider, scales = None, (0.0, 0.0)
        if zigzag_steps:
            guider, scales = guider_of(model), (strong_cfg, weak_cfg)
            turning = min(zigzag_steps, int((sigmas[1:] > 0).sum()))
            LOG.info(
                "%s: %s; %d of %d steps.", WHO, guidance_gap(guider, strong_cfg, weak_cfg), turning, len(sigmas) - 1
            )
        strong, weak = (_denoiser(model, guider, scale, extra_args or {}) for scale in scales)
        for i, state, denoised, x_next in kernel.sample_zigzag(strong, weak, x, sigmas, zigzag_steps, rounds):
            if callback is not None:
                callback({"x": state, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = x_next
        return x

    sample.__name__ = "sample_attune_zigzag"
    return comfy.samplers.KSAMPLER(sample)
