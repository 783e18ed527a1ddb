"""One More Step inside the host: load the network, and begin runs from a better first state."""

from __future__ import annotations

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
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from ...kernels.one_more_step import SignalLeak, clean_of_v, first_state, guided, keyed_noise, noise_for
from ...models import one_more_step as files
from .._plan.latents import latent_text, refuse_nested
from .identity import SPACIAL, TEMPORAL, as_sampled
from .start import Start, StartingRun, with_start

LOG = logging.getLogger(__name__)
MODULE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SEEN_NOISE = ("ddpm", "ddim")  # a noise of its own, or the sampler's
ZERO_SNR, SMALL_EFFECT = 500, 30  # sigma_max of models that begin at pure noise, and nearly there
LATENT_NAMES = {"SD15": "SD1.x, SD2.x", "SDXL": "SDXL", "DemoLatent": "the demo model's"}
REPOSITORIES = {"SD15": "h1t/oms_b_openclip_15_21", "SDXL": "h1t/oms_b_openclip_xl", "DemoLatent": "attune_demo"}


class TimelessUNet(UNetModel):
    """The host's UNet without its time path: noise [b c h w], text [b tokens width] -> v [b c h w]."""

    def __init__(self, architecture: files.Architecture, operations=comfy.ops.disable_weight_init, **kwargs):
        super().__init__(**architecture.unet_config(), operations=operations, **kwargs)
        self.time_embed = nn.Identity()
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.skip_t_emb, block.emb_layers, block.exchange_temb_dims = True, None, False

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, timesteps=torch.zeros(len(x), device=x.device), context=context)


def diffusers_names(architecture: files.Architecture) -> dict[str, str]:
    """Name in a published file -> name in the host's class, for every tensor of a timeless network."""
    with torch.device("meta"):
        own = TimelessUNet(architecture, dtype=torch.float32).state_dict().keys()
    return {theirs: ours for theirs, ours in comfy.utils.unet_to_diffusers(architecture.unet_config()).items()
            if ours in own}  # fmt: skip


def initialise(network: TimelessUNet, generator: torch.Generator) -> None:
    """PyTorch's usual random weights, which the host's layers leave out, and no output at all to begin with."""
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters(recurse=False):
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    for parameter in network.out[2].parameters():
        nn.init.zeros_(parameter)


@dataclass(frozen=True)
class Module:
    """A loaded network and what it is for: width of its text, channels and class of its latents, v or x0."""

    name: str
    patcher: comfy.model_patcher.ModelPatcher
    dtype: torch.dtype  # it computes in
    architecture: files.Architecture
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
                f"Attune One More Step: '{self.name}' produced values that are not numbers. Set 'weight_dtype' to "
                "fp32 in Attune Load One More Step."
            )
        return clean_of_v(out) if self.prediction == "v" else out


def load_module(path: Path, latent_space: str, dtype: str, prediction: str, head_dim: int) -> Module:
    """The network of a file, strictly: built without memory, compared with the file's header, only then read."""
    header = files.read_header(path)
    architecture = files.architecture_of(header, head_dim)
    names = diffusers_names(architecture)
    with torch.device("meta"):
        network = TimelessUNet(architecture, comfy.ops.manual_cast, dtype=torch.float32)
    own = network.state_dict()
    files.check_shapes(header, {theirs: tuple(own[ours].shape) for theirs, ours in names.items()})
    space = files.latent_space_of(header, architecture.context_dim, latent_space)
    device = comfy.model_management.get_torch_device()
    count = sum(parameter.numel() for parameter in network.parameters())
    kept = MODULE_DTYPES.get(dtype) or comfy.model_management.unet_dtype(model_params=count)
    if comfy.model_management.is_device_cpu(device) and not MODULE_DTYPES.get(dtype):
        kept = torch.float32
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    network.load_state_dict(
        {names[k]: v.to(kept) for k, v in tensors.items() if not k.startswith(files.LEAK)}, assign=True
    )
    network.dtype = kept
    patcher = comfy.model_patcher.ModelPatcher(
        network.train(False).requires_grad_(False), device, comfy.model_management.unet_offload_device()
    )
    # Newer hosts ask for another one for each further GPU of the MODEL that it goes with.
    patcher.cached_patcher_init = (_patcher_of, (path, latent_space, dtype, prediction, head_dim))
    runs = comfy.model_management.unet_manual_cast(kept, device) or kept
    return Module(
        path.stem, patcher, runs, architecture, space, files.prediction_of(header, prediction), files.read_leak(header)
    )  # fmt: skip


def _patcher_of(*file: Any, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Of the arguments of `load_module`; it is never a dynamic one."""
    return load_module(*file).patcher


def check_model(model) -> None:
    """ValueError for models that have nothing to correct; a warning where there is little."""
    top = highest_noise(model.get_model_object("model_sampling"), type(model.model).__name__)
    if top > SMALL_EFFECT:
        LOG.warning(
            "Attune One More Step: this model's terminal SNR is %.1e, so the node will have little effect. What the "
            "start lacks in the brightness of 1024 x 1024 pixels is %.2g of the noise (for SDXL it is 76.7).",
            top**-2, 128**2 / top**2,
        )  # fmt: skip


def highest_noise(sampling: Any, kind: str) -> float:
    """The noise where the sampling of a model of this kind begins, per spread of the data; ValueError where the model
    already begins at pure noise."""
    kinds = {one.__name__ for one in type(sampling).__mro__}
    if isinstance(sampling, comfy.model_sampling.CONST) or "COSMOS_RFLOW" in kinds:
        raise ValueError(
            f"Attune One More Step: {kind} is a flow-matching model. It already starts from pure noise (terminal SNR "
            "0), so there is nothing to correct. Remove this node."
        )
    top = float(sampling.sigma_max) / float(getattr(sampling, "sigma_data", 1.0))
    if top > ZERO_SNR:
        raise ValueError(
            f"Attune One More Step: this model already uses a zero-terminal-SNR schedule (sigma_max {top:.1f}). Remove "
            "this node, or turn zsnr off in ModelSamplingDiscrete if that was not intended."
        )
    return top


def check_plan(model, plan: FirstState) -> None:
    """ValueError where the module, the model and the prompts do not belong together."""
    if plan.module is None:
        return
    name, theirs = plan.module.name, type(model.get_model_object("latent_format")).__name__
    if theirs != plan.module.latent_space:
        known = LATENT_NAMES.get(theirs)
        remedy = f"load {REPOSITORIES[theirs]}" if known else "there is no module for this model; remove this node"
        raise ValueError(
            f"Attune One More Step: '{name}' was trained on {LATENT_NAMES.get(plan.module.latent_space)} latents but "
            f"the model uses {known or theirs} latents. The two are not interchangeable; {remedy}."
        )
    if not plan.positive:
        raise ValueError(
            f"Attune One More Step: '{name}' predicts from a prompt, but 'positive' is empty. Connect a CLIP Text "
            "Encode with the text encoder that the module was trained with."
        )
    if plan.cfg != 1 and not plan.negative:
        raise ValueError(
            "Attune One More Step: cfg other than 1 needs a negative prompt. Connect an empty one to 'negative'."
        )
    wanted = plan.module.architecture.context_dim
    for context, _ in [*plan.positive, *(plan.negative or [])]:
        width = 0 if context is None else context.shape[-1]
        if width != wanted:
            found, needed = (f" ({files.ENCODERS[d]})" if d in files.ENCODERS else "" for d in (width, wanted))
            raise ValueError(
                f"Attune One More Step: '{name}' needs {wanted}-dim conditioning{needed}, but got {width}{found}. "
                "Encode its prompt with the text encoder it was trained with."
            )


def fitted_leak(model, examples: dict, frequencies: int) -> SignalLeak:
    """The leak of a LATENT of examples, in the model's scale."""
    check_model(model)
    refuse_nested(examples["samples"], "examples")
    samples, channels = examples["samples"], model.get_model_object("latent_format").latent_channels
    if samples.ndim == 4 and samples.shape[1] != channels:
        raise ValueError(
            f"Attune Signal Leak: the 'examples' have {samples.shape[1]} channels, but the model's latents have "
            f"{channels}: encode them with this model's VAE."
        )
    return SignalLeak.fit(model.model.process_latent_in(samples), frequencies)


@dataclass(frozen=True)
class FirstState(Start):
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
    place = "first state"

    @property
    def who(self) -> str:
        return "Attune One More Step" if self.module else "Attune Signal Leak"

    @property
    def patchers(self) -> list[comfy.model_patcher.ModelPatcher]:
        return [self.module.patcher] if self.module else []

    def objection(self, run: StartingRun) -> None:
        highest_noise(run.sampling, type(run.guider.inner_model).__name__)  # nodes behind this one may have changed it

    def begin(self, run: StartingRun) -> tuple[Tensor, str]:
        sigma, highest = float(run.sigmas[0]), float(run.sampling.sigma_max)
        check_latent(self, run.noise)
        if sigma > 1.01 * highest:
            LOG.warning("%s: the run starts at sigma %.4g, above the model's own %.4g.", self.who, sigma, highest)
        x0, covered = predict(self, run.noise)
        one = torch.ones(1, 1, 1, 1, device=run.sigmas.device)
        scale = float(run.sampling.noise_scaling(run.sigmas[0], one, torch.zeros_like(one), run.top))
        state = first_state(x0, run.noise, sigma, self.level)
        within = [m for m in (run.mask, covered) if m is not None]
        weight = math.prod(within[1:], start=within[0]) if within else 1.0
        noise = noise_for(state, run.noise, scale, run.latent, weight, self.strength)
        return noise, f"{len(noise)} latents begin at sigma {sigma:.4g}, strength {self.strength:.3g}"


def with_first_state(model, plan: FirstState):
    """A clone of MODEL whose runs begin as `plan` says, checked now; MODEL itself at strength 0."""
    check_model(model)
    check_plan(model, plan)
    return with_start(model, plan)


def check_latent(plan: FirstState, noise: Tensor) -> None:
    channels = plan.module.architecture.in_channels if plan.module else len(plan.leak.mean) if plan.leak else None
    if noise.ndim != 4 or channels not in (None, noise.shape[1]) or noise.shape[2] * noise.shape[3] < 2:
        kind = f"{channels}-channel latents" if channels else "latents"
        raise ValueError(
            f"{plan.who} expects {kind} of pictures, of more than one pixel, but got {latent_text(noise.shape)}. Give "
            "the sampler an empty latent of this model's kind."
        )


def predict(plan: FirstState, noise: Tensor) -> tuple[Tensor, Tensor | None]:
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
                f"Attune One More Step: '{plan.module.name if plan.module else ''}' does not say how pictures differ. "
                "Connect 'signal_leak' from Attune Signal Leak, or set diversity to 0."
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


def predicted_latent(model, plan: FirstState, latent: dict, seed: int = 0) -> dict:
    """The prediction alone as a LATENT of the shape of `latent`; it hardly depends on the seed."""
    refuse_nested(latent["samples"], "latent")
    samples = as_sampled(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    check_latent(plan, noise)
    comfy.model_management.load_models_gpu(plan.patchers)
    x0, _ = predict(plan, noise.to(comfy.model_management.get_torch_device()))
    kept = {key: value for key, value in latent.items() if key not in (SPACIAL, TEMPORAL)}
    return {**kept, "samples": model.model.process_latent_out(x0).cpu()}
