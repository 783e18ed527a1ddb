"""Inversion inside one run of the host's sampling, the sampler that replays it, and latents and prompts of a morph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import latent_preview
import torch
from comfy.k_diffusion.sampling import trange
from torch import Tensor

from ...kernels.noise_space import FreshNoise, NoiseMaps, focus_mask, invert, repeated, sample_replay, varied
from ...kernels.schedules import check_sigmas
from ...models.noise_maps import InvertedPicture
from .._plan.latents import refuse_nested
from .api import io
from .calibrating import inside_run
from .clock import noise_space
from .identity import as_sampled, identify
from .session import last, stop_if_asked

LOG = logging.getLogger(__name__)
WHO = "Attune Replay"
PLAN = "plan"  # option of the sampler function

NoiseMapsType = io.Custom("ATTUNE_NOISE_MAPS")


# --- inversion ---


def invert_picture(
    model, positive: list, negative: list, cfg: float, latent: dict, sigmas: Tensor, eta: float, seed: int,
    dtype: torch.dtype,
) -> InvertedPicture:  # fmt: skip
    """The noise maps of a LATENT, in one run of the host; ValueError before it for what cannot be inverted."""
    samples, levels = _picture(model, latent), _levels(model, sigmas)
    sampling = model.get_model_object("model_sampling")
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    total = (len(levels) - 1) * (1 if eta else 2)
    shown = latent_preview.prepare_callback(model, total)

    def work(guided, sigmas: Tensor, extra_args: dict, noise: Tensor, picture: Tensor) -> NoiseMaps:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            stop_if_asked()
            with torch.no_grad():
                return guided(x, sigma.expand(len(x)), **extra_args)

        steps = invert(denoise, picture, levels, eta, noise_space(sampling), fresh_noise(picture, seed), dtype)
        return last(_watched(steps, shown, total))

    maps = inside_run(guider, torch.zeros_like(samples), samples, levels.clone(), seed, work)
    return InvertedPicture(maps, samples, {**whose(model), "cfg": f"{cfg:g}", "seed": str(seed)})


def _watched(steps, shown: Callable, total: int):
    """The same generator; each evaluation moves the node's bar and its picture."""
    while True:
        try:
            i, x, denoised = next(steps)
        except StopIteration as end:
            return end.value
        shown(i, denoised, x, total)
        yield


def _picture(model, latent: dict) -> Tensor:
    """The samples of a LATENT to invert, float32 on the CPU."""
    samples, mask = latent["samples"], latent.get("noise_mask")
    refuse_nested(samples, "latent", "a latent of pictures or of one video")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError(
            "The latent has a noise mask, but Attune Invert inverts whole pictures. Connect the latent from before Set "
            "Latent Noise Mask here, and the masked one to the sampler that replays: there it says what may change."
        )
    if not bool(samples.any()):
        raise ValueError("The latent is empty, and there is no picture to invert. Connect VAE Encode of your picture.")
    return as_sampled(model, {"samples": samples}).detach().float().cpu()


def _levels(model, sigmas: Tensor) -> Tensor:
    """The levels of an inversion, float32 on the CPU."""
    levels = check_sigmas(sigmas.detach().float().cpu())
    highest = float(model.get_model_object("model_sampling").sigma_max)
    if levels[-1] != 0 or float(levels[0]) > 1.001 * highest:
        raise ValueError(
            f"'sigmas' goes from {float(levels[0]):.4g} to {float(levels[-1]):.4g}, but an inversion needs levels from "
            f"this model's {highest:.4g} at most down to 0. Connect a schedule that was made for this MODEL, without "
            "its end cut off."
        )
    return levels


def fresh_noise(like: Tensor, seed: int) -> FreshNoise:
    """Draws of unit noise on the CPU, one after the other; the global random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator).to(like)


def whose(model) -> dict[str, str]:
    """With which MODEL maps were made, to know it again."""
    about = identify(model, weights=True)
    return {
        "family": about.family, "config_hash": about.config_hash, "weights": about.weights_hash,
        "patches": about.patches,
    }  # fmt: skip


# --- replay ---


@dataclass(frozen=True)
class ReplayPlan:
    """What a replay does: maps as edited, the last residual's weight, from which share of the largest change on the
    prompt counts, and fresh noise from a step on."""

    inverted: InvertedPicture
    detail: float = 1.0
    focus: float = 0.0
    variation: float = 0.0
    varied_from: int = 0
    seed: int = 0

    def check_variation(self) -> None:
        """ValueError for maps that cannot be varied."""
        maps = self.inverted.maps
        varied(maps, self.variation, maps.steps, fresh_noise(maps.picture, self.seed))

    def maps_for(self, x: Tensor) -> tuple[NoiseMaps, NoiseMaps]:
        """The maps for a batch of the size of x: as they were inverted, and with fresh noise."""
        maps = self.inverted.maps
        if len(maps.picture) != len(x):
            maps = repeated(maps, len(x))
        return maps, varied(maps, self.variation, self.varied_from, fresh_noise(maps.picture, self.seed))


@torch.no_grad()
def sample_attune_replay(
    model, x, sigmas, extra_args=None, callback=None, disable=None, plan: ReplayPlan | None = None
):
    """The host's form of a solver, for noise maps: its levels must be theirs, from some step on."""
    assert plan is not None
    extra_args = dict(extra_args or {})
    guider = _guider(model)
    start = _check_run(plan.inverted, guider, x, sigmas)
    found, maps = plan.maps_for(x)
    free = _free(extra_args, guider, sigmas)
    each = x.new_ones(len(x))

    def denoise(state: Tensor, sigma: Tensor) -> Tensor:
        return model(state, sigma * each, **{**extra_args, "denoise_mask": None})

    def mask(i: int, denoised: Tensor) -> Tensor:
        allowed = x.new_ones(1) if free is None else free(i - start)
        return allowed * focus_mask(denoised, found.denoised(i, x), plan.focus) if plan.focus else allowed

    state = maps.states[start].to(x, copy=True)
    masked = mask if plan.focus or free is not None else None
    steps = sample_replay(denoise, maps, state, start, plan.detail, masked)
    for _ in trange(maps.steps - start, disable=disable):
        i, state, denoised, x = next(steps)
        if callback is not None:
            level = sigmas[i - start]
            callback({"x": state, "i": i - start, "sigma": level, "sigma_hat": level, "denoised": denoised})
    return x


def replay_sampler(plan: ReplayPlan) -> Any:
    """A SAMPLER; goes with the levels of its maps, from the step on at which it begins."""
    return comfy.samplers.KSAMPLER(sample_attune_replay, {PLAN: plan})


def _guider(model: Any) -> Any:
    """The guider behind what a sampler is given, None where another pack's function around it hides it."""
    while model is not None and not hasattr(model, "model_patcher"):
        model = getattr(model, "inner_model", None)
    return model


def _free(extra_args: dict, guider: Any, sigmas: Tensor) -> Callable[[int], Tensor] | None:
    """Step of the run -> the noise mask of its LATENT, as a Differential Diffusion on the MODEL wants it there; but
    what the mask keeps for good stays kept at the lowest level, too."""
    mask = extra_args.get("denoise_mask")
    change = extra_args.get("model_options", {}).get("denoise_mask_function")
    if mask is None or change is None:
        return None if mask is None else lambda i: mask
    options = {"model": guider, "sigmas": sigmas}
    return lambda i: change(sigmas[i] * sigmas.new_ones(len(mask)), mask, extra_options=options) * (mask > 0)


def _check_run(inverted: InvertedPicture, guider: Any, x: Tensor, sigmas: Tensor) -> int:
    """The step of the maps at which a run begins; ValueError for a run of another model, size or levels."""
    maps = inverted.maps
    if guider is not None:
        check_same_model(inverted, guider.model_patcher)
    count, shape = len(maps.picture), list(maps.picture.shape[1:])
    if list(x.shape[1:]) != shape or count not in (1, len(x)):
        raise ValueError(
            f"{WHO}: the noise maps are of {count} latents of {shape}, but the sampler got {len(x)} of "
            f"{list(x.shape[1:])}. Give it a latent of that size, such as the one that was inverted."
        )
    given, levels = sigmas.double().cpu(), maps.sigmas
    start = len(levels) - len(given)
    if start < 0 or not torch.allclose(given, levels[start:], rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{WHO}: the run has {len(given) - 1} steps from sigma {float(given[0]):.4g}, but the noise maps were made "
            f"on {maps.steps} steps from {float(levels[0]):.4g}. Connect the SIGMAS of {WHO}, or of the node that gave "
            "this SAMPLER, without a node between them."
        )
    return start


def check_same_model(inverted: InvertedPicture, model: Any, who: str = WHO) -> None:
    """ValueError where a MODEL is another one than that of the maps; other LoRAs are an edit, and the log says so."""
    mine, theirs = whose(model), inverted.facts
    for key in ("config_hash", "weights"):
        if theirs.get(key) and mine[key] and mine[key] != theirs[key]:
            what = "another kind of model" if key == "config_hash" else "another checkpoint"
            raise ValueError(
                f"{who}: the noise maps were made with {what} ({theirs.get('family') or 'unknown'}) than this MODEL "
                f"({mine['family']}). Invert the picture with this MODEL, or load the one of the maps."
            )
    if mine["patches"] != theirs.get("patches"):
        LOG.info("%s: the LoRAs are not those of the inversion, so the picture will be another one.", who)


# --- morph ---


def at_wire(model, maps: NoiseMaps) -> Tensor | None:
    """The first states of maps as a LATENT's samples, with which a stock sampler goes on without adding noise.

    None where no LATENT can hold them: at a flow's level 1 there is no picture in them.
    """
    sigma, state = maps.sigmas[0].float(), maps.states[0].float()
    sampling = model.get_model_object("model_sampling")
    if maps.space.kind == "flow" and float(sigma) >= 1:
        return None
    return model.model.process_latent_out(sampling.inverse_noise_scaling(sigma, state))


def prompts_between(one: list, other: list, factors: list[float]) -> list:
    """A CONDITIONING whose batch goes from one prompt to another, a factor for each picture; ValueError where they are
    not built alike. All but the texts is the first one's."""
    if len(one) != len(other):
        raise ValueError(
            f"'positive_1' has {len(one)} parts, 'positive_2' has {len(other)}. Give both the same areas and ranges, "
            "or none."
        )
    return [
        [_between(tokens, theirs, factors), _extras_between(extra, more, factors)]
        for (tokens, extra), (theirs, more) in zip(one, other, strict=True)
    ]


def _extras_between(one: dict, other: dict, factors: list[float]) -> dict:
    mine, theirs = one.get("pooled_output"), other.get("pooled_output")
    if mine is None or theirs is None:
        return dict(one)
    return {**one, "pooled_output": _between(mine, theirs, factors)}


def _between(one: Tensor, other: Tensor, factors: list[float]) -> Tensor:
    """[1 ...] and [1 ...] -> [n ...]; the shorter of two rows of tokens is filled with zeros, as the host does."""
    if one.ndim == 3 and one.shape[1] != other.shape[1]:
        longest = max(one.shape[1], other.shape[1])
        one, other = (torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (one, other))
    return torch.cat([torch.lerp(one[:1], other[:1], f) for f in factors])
