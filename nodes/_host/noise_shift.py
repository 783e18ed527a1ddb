"""Calibrate what a network is told on clean pictures, and choose it for each run by the latent that is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...kernels.conditioning import ConditioningMap
from ...kernels.noise_shift import Limits, Shift, ShiftPreset, fit_joint
from ...kernels.space import NoiseSpace
from ...models.calibration import Calibration
from .._plan.noise_shift import Size, shift_for
from .calibrating import calibrating, inside_run
from .conditioning import Remap, options_for_solve, told_at, with_choice_per_solve, with_conditioning
from .identity import identify, pixels_a_side
from .solvers import run_stock_node, sample

STEPS = 20  # of the model's own pictures
SDXL_ADM = {2816, 2560}  # inputs of SDXL's and its refiner's second condition: pooled text and sizes
POOLED = 1280  # the pooled text among them


@dataclass(frozen=True)
class SizedRemap(Remap):
    """A map that depends on the size of the picture being sampled, pass by pass."""

    profile: Calibration | None = None
    strength: float = 1.0
    _chosen: dict[Size, tuple[ConditioningMap, str]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, size: Size | None) -> tuple[ConditioningMap, str]:
        assert self.profile is not None
        if size is None:
            identity = ConditioningMap.through(NoiseSpace(self.profile.space), [0.5], [0.5])
            return identity, "this latent is no picture: nothing is changed."
        if size not in self._chosen:
            self._chosen[size] = shift_for(self.profile, size, self.strength)
        return self._chosen[size]


def with_noise_shift(model, profile: Calibration, strength: float):
    """A clone of MODEL that hears the shift of the size it samples; MODEL itself where no size has any."""
    maps = [shift_for(profile, one.resolution, strength)[0] for one in profile.alignments]
    changing = next((one for one in maps if not one.is_identity), maps[0])
    return with_conditioning(model, SizedRemap(profile.name, changing, profile=profile, strength=strength))


def calibrate(
    model, positive: Sequence, latents: Tensor, chunk: int, effort: ShiftPreset, seed: int,
    told: Callable[[int, dict[float, float] | None], None],
) -> Shift:  # fmt: skip
    """The shift that clean latents of one size ask for; `positive`: one prompt a latent, or one for all.

    `chunk` pictures go through the network at once. told: of the evaluations, and whenever a level is done of the
    offsets with the least loss so far, by level.
    """
    about = identify(model)
    space, limits = about.noise_space, Limits(about.sigma_min, about.sigma_max)
    starts = range(0, len(latents), chunk)

    @torch.no_grad()
    def measured(guided, sigmas: Tensor, extra_args: dict, noise: Tensor, latent: Tensor) -> Shift:
        def denoise(x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
            """All pictures at one level, told one level, by their prompts alone (no guidance)."""
            options = options_for_solve(extra_args["model_options"], told_at(space, sigma, told), sigma[:1])
            parts = []
            for i, start in enumerate(starts):
                comfy.model_management.throw_exception_if_processing_interrupted()
                conds, rows = guided.conds[f"positive {i}"], slice(start, start + chunk)
                parts += comfy.samplers.calc_cond_batch(guided.inner_model, [conds], x[rows], sigma[rows], options)
            return torch.cat(parts)

        fit = fit_joint(denoise, latent.float(), effort, space, limits, seed)
        seen = 0
        while True:
            try:
                evaluations, least = next(fit)
                told(evaluations, least if len(least) > seen else None)
                seen = len(least)
            except StopIteration as end:
                return end.value

    guider = comfy.samplers.CFGGuider(with_choice_per_solve(calibrating(model)))
    guider.inner_set_conds(
        {f"positive {i}": prompts_of(positive, s, s + chunk, len(latents)) for i, s in enumerate(starts)}
    )
    whole = torch.tensor([about.sigma_max, 0.0])
    return inside_run(guider, torch.zeros_like(latents), latents, whole, 0, measured)


def prompts_of(positive: Sequence, start: int, end: int, count: int) -> list:
    """The prompts of the pictures start … end of `count`; tensors that do not hold one row a picture go to all."""

    def part(value):
        rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == count and count > 1
        return value[start:end] if rows else value

    return [[part(context), {key: part(value) for key, value in extra.items()}] for context, extra in positive]


def check_prompts(positive: Sequence, count: int) -> None:
    """ValueError unless there is one prompt, or one for each of `count` pictures."""
    found = {len(context) for context, _ in positive if context is not None} - {1}
    if found - {count}:
        raise ValueError(
            f"'positive' holds {max(found)} prompts for {count} pictures. Give one prompt for all, or one for each."
        )


def data_hash(latent: dict | None, images: Tensor | None, prompts: Sequence) -> str:
    """Names the pictures and prompts that a fit is about to use: it goes on with these alone."""
    digest = hashlib.sha256()
    given = [None if latent is None else latent["samples"], images, *(context for context, _ in prompts)]
    for tensor in given:
        digest.update(b"-" if tensor is None else tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def without_text(model) -> list:
    """CONDITIONING of zeros, as the stock ConditioningZeroOut makes it; ValueError where its width is not known."""
    config = model.model.model_config.unet_config
    embedder = (config.get("context_embedder_config") or {}).get("params", {})
    widths = [config.get("context_dim"), config.get("context_in_dim"), config.get("joint_attention_dim")]
    width = next((w for w in [*widths, embedder.get("in_features")] if isinstance(w, int)), None)
    if width is None:
        raise ValueError(
            f"This MODEL ({type(model.model).__name__}) does not tell how wide its text is: connect 'positive'; a "
            "CLIP Text Encode with an empty text will do."
        )
    adm = config.get("adm_in_channels") or config.get("vec_in_dim")
    pooled = POOLED if adm in SDXL_ADM else adm
    return [[torch.zeros(1, 1, width), {"pooled_output": torch.zeros(1, pooled)} if isinstance(pooled, int) else {}]]


def encoded_at(vae, images: Tensor, size: Size) -> Tensor:
    """Latents of IMAGE [n h w c], cut to the middle and brought to `size` by Lanczos' filter."""
    width, height = size
    pixels = comfy.utils.common_upscale(images[..., :3].movedim(-1, 1), width, height, "lanczos", "center").movedim(
        1, -1
    )
    parts = [run_stock_node("VAEEncode", pixels=one, vae=vae)[0]["samples"] for one in pixels.split(1)]
    return torch.cat(parts).float()


def draw_own(model, vae, positive: Sequence, negative: Sequence | None, cfg: float, size: Size, count: int, seed: int):
    """`count` pictures IMAGE [n h w c] that the model itself draws at `size`, with its prompts in turn."""
    sampling, latent_format = model.get_model_object("model_sampling"), model.get_model_object("latent_format")
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple" if flow else "karras", STEPS)
    side = pixels_a_side(latent_format)
    empty = {"samples": torch.zeros(1, latent_format.latent_channels, size[1] // side, size[0] // side)}
    pictures = []
    for i in range(count):
        prompt = prompts_of(positive, i, i + 1, count)
        against, scale_of_it = (prompt, 1.0) if negative is None else (negative, cfg)
        drawn = sample(model, (seed + i) % 2**64, scale_of_it, "dpmpp_2m", sigmas, prompt, against, empty)
        pictures.append(run_stock_node("VAEDecode", samples=drawn, vae=vae)[0])
    return torch.cat(pictures)
