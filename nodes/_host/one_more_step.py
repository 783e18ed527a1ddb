"""One More Step inside the host: load the network, and hand the sampler the noise of a better first state.

The noise is replaced where the host calls the sampler: there the latent is in the model's scale, the levels are final,
masks have their shape and the network is loaded beside the model. Everything lives on a MODEL clone.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.one_more_step import SignalLeak, clean_of_v, first_state, guided, keyed_noise, noise_for
from ...models.one_more_step import (
    ENCODERS,
    LEAK,
    Architecture,
    architecture_of,
    check_shapes,
    latent_space_of,
    prediction_of,
    read_header,
    read_leak,
)
from .timeless_unet import TimelessUNet, diffusers_names

LOG = logging.getLogger(__name__)
KEY = "attune.one_more_step"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SOLVERS = ("ddpm", "ddim")
ZERO_SNR, SMALL_EFFECT = 500, 30  # sigma_max of models that begin at pure noise, and nearly there
LATENT_NAMES = {"SD15": "SD1.x, SD2.x", "SDXL": "SDXL", "DemoLatent": "the demo model's"}
REPOSITORIES = {"SD15": "h1t/oms_b_openclip_15_21", "SDXL": "h1t/oms_b_openclip_xl", "DemoLatent": "attune_demo"}


@dataclass(frozen=True)
class Module:
    """A loaded network and what it is for: width of its text, channels and class of its latents, v or x0."""

    name: str
    patcher: comfy.model_patcher.ModelPatcher
    dtype: torch.dtype  # it computes in
    architecture: Architecture
    latent_space: str
    prediction: str
    leak: SignalLeak | None

    def __call__(self, noise: Tensor, context: Tensor) -> Tensor:
        """x0 from unit noise [b c h w] and text [1 or b, tokens width]; the network must be loaded."""
        context = comfy.utils.repeat_to_batch_size(context.to(noise.device, self.dtype), len(noise))
        with torch.no_grad():
            out = self.patcher.model(noise.to(self.dtype), context=context).float()
        if not bool(torch.isfinite(out).all()):
            raise ValueError(
                f"One More Step: '{self.name}' produced values that are not numbers. Choose weight_dtype fp32 in Load "
                "One More Step."
            )
        return clean_of_v(out) if self.prediction == "v" else out


@dataclass(frozen=True)
class Plan:
    """What a run shall begin with: a prediction, a leak, or both.

    cfg: guidance of the prediction. diversity: how much of the leak's variety to add. solver: "ddpm" gives the network
    a noise of its own, "ddim" the sampler's. share: one prediction for the whole batch, for frames of a video.
    """

    module: Module | None
    positive: list | None
    negative: list | None
    cfg: float = 1.0
    strength: float = 1.0
    solver: str = "ddpm"
    level: str = "exact"
    leak: SignalLeak | None = None
    diversity: float = 0.0
    share: bool = False


def load_module(path: Path, latent_space: str, dtype: str, prediction: str, head_dim: int) -> Module:
    """The network of a file, strictly: built without memory, compared with the file's header, only then read."""
    header = read_header(path)
    architecture = architecture_of(header, head_dim)
    names = diffusers_names(architecture)
    with torch.device("meta"):
        network = TimelessUNet(architecture, comfy.ops.manual_cast, dtype=torch.float32)
    own = network.state_dict()
    check_shapes(header, {theirs: tuple(own[ours].shape) for theirs, ours in names.items()})
    space = latent_space_of(header, architecture.context_dim, latent_space)
    device = comfy.model_management.get_torch_device()
    count = sum(parameter.numel() for parameter in network.parameters())
    kept = DTYPES.get(dtype) or comfy.model_management.unet_dtype(model_params=count)
    if comfy.model_management.is_device_cpu(device) and not DTYPES.get(dtype):
        kept = torch.float32
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    network.load_state_dict({names[k]: v.to(kept) for k, v in tensors.items() if not k.startswith(LEAK)}, assign=True)
    network.dtype = kept
    patcher = comfy.model_patcher.ModelPatcher(
        network.eval().requires_grad_(False), device, comfy.model_management.unet_offload_device()
    )
    runs = comfy.model_management.unet_manual_cast(kept, device) or kept
    return Module(
        path.stem, patcher, runs, architecture, space, prediction_of(header, prediction), read_leak(header)
    )  # fmt: skip


def check_model(model) -> None:
    """ValueError for models that have nothing to correct; a warning where there is little."""
    top = highest_noise(model.get_model_object("model_sampling"), type(model.model).__name__)
    if top > SMALL_EFFECT:
        LOG.warning(
            "One More Step: terminal SNR %.1e, it will have little effect: the share of the missing trace in the "
            "brightness of 1024 x 1024 pixels is %.2g of the noise (76.7 for SDXL).", top**-2, 128**2 / top**2,
        )  # fmt: skip


def highest_noise(sampling: Any, kind: str) -> float:
    """The noise where the sampling of a model of this kind begins, per spread of the data; ValueError where the model
    already begins at pure noise."""
    kinds = {one.__name__ for one in type(sampling).__mro__}
    if isinstance(sampling, comfy.model_sampling.CONST) or "COSMOS_RFLOW" in kinds:
        raise ValueError(
            f"One More Step: {kind} is a flow-matching model. It already starts from pure noise (terminal SNR 0), so "
            "there is nothing to correct. Remove this node."
        )
    top = float(sampling.sigma_max) / float(getattr(sampling, "sigma_data", 1.0))
    if top > ZERO_SNR:
        raise ValueError(
            f"One More Step: this model already uses a zero-terminal-SNR schedule (sigma_max {top:.1f}). Remove this "
            "node, or turn zsnr off in ModelSamplingDiscrete if that was not intended."
        )
    return top


def check_plan(model, plan: Plan) -> None:
    """ValueError where the module, the model and the prompts do not belong together."""
    if plan.module is None:
        return
    name, theirs = plan.module.name, type(model.get_model_object("latent_format")).__name__
    if theirs != plan.module.latent_space:
        known = LATENT_NAMES.get(theirs)
        remedy = f"load {REPOSITORIES[theirs]}" if known else "there is no module for this model; remove this node"
        raise ValueError(
            f"One More Step: '{name}' was trained on {LATENT_NAMES.get(plan.module.latent_space)} latents but the "
            f"model uses {known or theirs} latents. The two are not interchangeable; {remedy}."
        )
    if not plan.positive:
        raise ValueError("One More Step: connect a positive conditioning.")
    if plan.cfg != 1 and not plan.negative:
        raise ValueError(
            "One More Step: cfg other than 1 needs a negative conditioning. Connect an empty prompt to 'negative'."
        )
    wanted = plan.module.architecture.context_dim
    for context, _ in [*plan.positive, *(plan.negative or [])]:
        width = 0 if context is None else context.shape[-1]
        if width != wanted:
            found, needed = (f" ({ENCODERS[d]})" if d in ENCODERS else "" for d in (width, wanted))
            raise ValueError(
                f"One More Step: '{name}' needs {wanted}-dim conditioning{needed}, but got {width}{found}. Encode its "
                "prompt with the text encoder it was trained with."
            )


def fitted_leak(model, examples: dict, frequencies: int) -> SignalLeak:
    """The leak of a LATENT of examples, in the model's scale."""
    check_model(model)
    samples, channels = examples["samples"], model.get_model_object("latent_format").latent_channels
    if samples.ndim == 4 and samples.shape[1] != channels:
        raise ValueError(
            f"Attune Signal Leak: the 'examples' have {samples.shape[1]} channels, but the model's latents have "
            f"{channels}: encode them with this model's VAE."
        )
    return SignalLeak.fit(model.model.process_latent_in(samples), frequencies)


def with_first_state(model, plan: Plan):
    """A clone of MODEL whose runs begin as `plan` says, in place of an earlier plan; MODEL itself at strength 0."""
    check_model(model)
    check_plan(model, plan)
    if plan.strength == 0:
        return model
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, functools.partial(_begin, plan))
    clone.set_additional_models(KEY, [plan.module.patcher] if plan.module else [])
    return clone


def _begin(
    plan: Plan, executor, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest, **newer
):
    """SAMPLER_SAMPLE: another noise, all else as it came."""
    sampling = guider.inner_model.model_sampling
    highest_noise(sampling, type(guider.inner_model).__name__)  # nodes behind this one may have changed it
    top = _from_the_top(executor.class_obj, guider, sampling, sigmas)
    noise = begin(plan, sampling, sigmas, noise, latent_image, denoise_mask, top)
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest, **newer)


def _from_the_top(sampler: Any, guider: Any, sampling: Any, sigmas: Tensor) -> bool:
    if hasattr(sampler, "max_denoise"):
        return bool(sampler.max_denoise(guider, sigmas))
    return from_the_top(sampling, sigmas)


def from_the_top(sampling: Any, sigmas: Tensor) -> bool:
    """Whether the host takes a run for one from pure noise, by the host's own rule."""
    first, highest = float(sigmas[0]), float(sampling.sigma_max)
    return first > highest or math.isclose(first, highest, rel_tol=1e-5)


def begin(
    plan: Plan, sampling: Any, sigmas: Tensor, noise: Tensor, latent: Tensor, mask: Tensor | None, top: bool
) -> Tensor:  # fmt: skip
    """The noise to hand to the sampler in place of `noise`; `noise` itself where the run begins otherwise.

    noise and latent [b c h w] in the model's scale, mask like noise or None; top: see `from_the_top`.
    """
    reason = why_not(sigmas, noise, latent, top)
    if reason:
        LOG.info("One More Step: stands aside, %s.", reason)
        return noise
    check_latent(plan, noise)
    sigma = float(sigmas[0])
    if sigma > 1.01 * float(sampling.sigma_max):
        LOG.warning("One More Step: the run starts at sigma %.4g, above the model's own %.4g.", sigma,
                    float(sampling.sigma_max))  # fmt: skip
    x0, covered = predict(plan, noise)
    one = torch.ones(1, 1, 1, 1, device=sigmas.device)
    scale = float(sampling.noise_scaling(sigmas[0], one, torch.zeros_like(one), top))
    state = first_state(x0, noise, sigma, plan.level)
    within = [m for m in (mask, covered) if m is not None]
    weight = math.prod(within[1:], start=within[0]) if within else 1.0
    LOG.info("One More Step: %d latents begin at sigma %.4g, strength %.3g.", len(noise), sigma, plan.strength)
    return noise_for(state, noise, scale, latent, weight, plan.strength)


def why_not(sigmas: Tensor, noise: Tensor, latent: Tensor, top: bool) -> str | None:
    """Why a run does not begin from noise alone, in the user's words."""
    if len(sigmas) < 2 or float(sigmas[0]) <= float(sigmas[-1]):
        return "the noise levels do not fall"
    if not bool(noise.any()):
        return "no noise is added"
    if not top and bool(latent.any()):
        return "the run starts from a picture"
    return None


def check_latent(plan: Plan, noise: Tensor) -> None:
    channels = plan.module.architecture.in_channels if plan.module else len(plan.leak.mean) if plan.leak else None
    if noise.ndim != 4 or channels not in (None, noise.shape[1]) or noise.shape[2] * noise.shape[3] < 2:
        kind = f"{channels}-channel latents" if channels else "latents"
        raise ValueError(
            f"One More Step expects {kind} of pictures, of more than one pixel, but got {list(noise.shape)}."
        )


def predict(plan: Plan, noise: Tensor) -> tuple[Tensor, Tensor | None]:
    """The clean latents to begin from [b c h w]; where (1) anything is known of them or not (0), None: everywhere."""
    keyed = noise[:1] if plan.share else noise
    x0, covered = torch.zeros_like(keyed, dtype=torch.float32), None
    if plan.module is not None:
        seen = keyed if plan.solver == "ddim" else keyed_noise(keyed)
        x0, covered = _conditional_mean(plan.module, plan.positive or [], seen.float())
        if plan.cfg != 1:
            x0 = guided(x0, _conditional_mean(plan.module, plan.negative or [], seen.float())[0], plan.cfg)
    leak = plan.leak or (plan.module.leak if plan.module else None)
    if plan.module is None and leak is not None:
        x0 = x0 + leak.mean_latent(*noise.shape[2:]).to(x0)
    if plan.diversity:
        if leak is None:
            raise ValueError(
                f"One More Step: '{plan.module.name if plan.module else ''}' does not say how pictures differ. Connect "
                "'signal_leak' from Attune Signal Leak, or set diversity to 0."
            )
        x0 = x0 + plan.diversity * leak.residual(keyed_noise(keyed, "leak").float())
    return x0.expand(noise.shape), covered


def _conditional_mean(module: Module, conditioning: list, noise: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prediction for a CONDITIONING, averaged where its parts overlap, and where it has any; None: everywhere."""
    parts = [(context, options) for context, options in conditioning if not options.get("start_percent", 0) > 0]
    if len(parts) == 1 and not {"area", "mask"} & parts[0][1].keys():
        return module(noise, parts[0][0]), None
    total, weights = torch.zeros_like(noise), torch.zeros_like(noise[:1, :1])
    for context, options in parts:
        weight = _weight(options, noise)
        total, weights = total + weight * module(noise, context), weights + weight
    return total / weights.clamp(min=1e-6), (weights > 0).to(noise)


def _weight(options: dict, noise: Tensor) -> Tensor:
    """Where and how strongly a part of a CONDITIONING holds, [1 1 h w]."""
    height, width = noise.shape[2:]
    weight = torch.full((1, 1, height, width), float(options.get("strength", 1.0)), device=noise.device)
    if area := options.get("area"):
        if area[0] == "percentage":
            area = tuple(round(share * side) for share, side in zip(area[1:], (height, width) * 2, strict=True))
        h, w, y, x = area
        inside = torch.zeros_like(weight)
        inside[..., y : y + h, x : x + w] = 1
        weight = weight * inside
    if (mask := options.get("mask")) is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])[:1].to(noise)
        mask = torch.nn.functional.interpolate(mask, (height, width), mode="bilinear")
        weight = weight * mask * float(options.get("mask_strength", 1.0))
    return weight


def predicted_latent(model, plan: Plan, latent: dict, seed: int) -> dict:
    """The prediction alone as a LATENT of the shape of `latent`."""
    check_model(model)
    check_plan(model, plan)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    check_latent(plan, noise)
    x0, _ = predict(plan, noise.to(_load(plan)))
    return {**latent, "samples": model.model.process_latent_out(x0).cpu()}


def _load(plan: Plan) -> torch.device:
    """Make the network ready; the device it runs on."""
    if plan.module is None:
        return comfy.model_management.get_torch_device()
    comfy.model_management.load_models_gpu([plan.module.patcher])
    return plan.module.patcher.load_device


class Noise:
    """A NOISE whose runs begin as `plan` says, for guiders that do not run through the host's own."""

    def __init__(self, model, noise, sigmas: Tensor, plan: Plan):
        check_model(model)
        check_plan(model, plan)
        self.seed = noise.seed
        self._model, self._noise, self._sigmas, self._plan = model, noise, sigmas, plan

    def generate_noise(self, latent: dict) -> Tensor:
        noise, samples = self._noise.generate_noise(latent), latent["samples"]
        if self._plan.strength == 0 or len(self._sigmas) < 2:
            return noise
        if getattr(samples, "is_nested", False):
            raise ValueError("One More Step expects latents of pictures, not of sound with pictures.")
        device = _load(self._plan)
        if bool(samples.any()):
            samples = self._model.model.process_latent_in(samples)
        mask = latent.get("noise_mask")
        if mask is not None:
            mask = comfy.utils.reshape_mask(mask, noise.shape).to(device)
        sampling = self._model.get_model_object("model_sampling")
        top = from_the_top(sampling, self._sigmas)
        sigmas = self._sigmas.to(device)
        return begin(self._plan, sampling, sigmas, noise.to(device), samples.to(device), mask, top).to(noise)
