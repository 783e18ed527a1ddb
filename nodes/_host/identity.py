"""What a MODEL tells about itself."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Sequence

import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ...models.calibration import UNPATCHED, ModelIdentity
from .._plan.latents import is_nested
from .._plan.makers import Sampled

SAMPLED_TENSORS, SAMPLED_NUMBERS = 16, 512  # of the weights, for their hash
NO_FAMILY = {"BASE", "object"}  # classes that every configuration has
DISTILLED = {"LCM", "ModelSamplingDiscreteDistilled"}
PIXELS_A_SIDE = {  # of one latent pixel, by latent format, for hosts whose formats do not say; all others have 8
    "Flux2": 16, "Wan22": 16, "HunyuanVideo15": 16, "HunyuanImage21": 32, "LTXV": 32, "ChromaRadiance": 1,
    "SC_Prior": 42, "SC_B": 4,
}  # fmt: skip
SPACIAL, TEMPORAL = "downscale_ratio_spacial", "downscale_ratio_temporal"  # what empty LATENTs of newer hosts say


def identify(model, weights: bool = False) -> ModelIdentity:
    """Family, noise space and levels of a MODEL, with every patch of its chain applied (ModelSampling… nodes too).

    weights: say also which weights and LoRAs these are, at the cost of reading some thousand of their numbers.
    """
    sampling = model.get_model_object("model_sampling")
    config = type(model.model.model_config)
    return ModelIdentity(
        families=tuple(c.__name__ for c in config.__mro__ if c.__name__ not in NO_FAMILY),
        space="flow" if isinstance(sampling, comfy.model_sampling.CONST) else "ve",
        sigma_min=float(sampling.sigma_min),
        sigma_max=float(sampling.sigma_max),
        prediction=prediction(sampling),
        config_hash=config_hash(model.model.model_config.unet_config),
        shift=getattr(sampling, "shift", None),
        factor=shift_factor(sampling),
        reshifted="model_sampling" in getattr(model, "object_patches", ()),
        noise_scale=noise_scale(sampling),
        network=model.model.model_config.unet_config,
        weights_hash=weights_hash(model) if weights else "",
        patches=patches_hash(model) if weights else "",
    )


def shift_factor(sampling) -> float | None:
    """The shift of a flow model's own levels as a factor of sigma / (1 - sigma), whatever unit it is stated in."""
    if not isinstance(sampling, comfy.model_sampling.CONST) or not hasattr(sampling, "shift"):
        return None
    half = float(sampling.sigma(sampling.timestep(torch.tensor(0.5))))
    return half / (1 - half) if 0 < half < 1 else None


def noise_scale(sampling) -> float:
    """How strong the noise of a flow model is; other models, older hosts, and a model without any noise have 1."""
    of_flow = isinstance(sampling, comfy.model_sampling.CONST)
    return float(getattr(sampling, "noise_scale", 1.0)) or 1.0 if of_flow else 1.0


def is_distilled(sampling) -> bool:
    """Whether a model_sampling is one for models that were distilled for a few timesteps of their own."""
    return any(one.__name__ in DISTILLED for one in type(sampling).__mro__)


def takes_latents_unscaled(sampling) -> bool:
    """Whether a network takes x / sqrt(1 + sigma^2) as it is, as CogVideoX does: for samplers made for it alone."""
    return any(one.__name__ == "V_PREDICTION_DDPM" for one in type(sampling).__mro__)


def prediction(sampling) -> str:
    """What the network of a model_sampling predicts: "eps", "v", "edm", "x0" or "flow"; else the host's class name."""
    names = {"CONST": "flow", "X0": "x0", "EDM": "edm", "V_PREDICTION": "v", "V_PREDICTION_DDPM": "v", "EPS": "eps"}
    for one in type(sampling).__mro__:
        if one.__module__ == "comfy.model_sampling" and one.__name__ in names:
            return names[one.__name__]
    return type(sampling).__mro__[-2].__name__.lower()


def network_of(model) -> Module:
    """A MODEL's network, itself where another pack put what torch.compile makes of it in its place."""
    network = model.get_model_object("diffusion_model")
    return getattr(network, "_orig_mod", network)


def config_hash(unet_config: dict) -> str:
    """Names the architecture: the same at every precision and for every file."""
    plain = (str, int, float, list, tuple, type(None))
    facts = {key: value for key, value in unet_config.items() if isinstance(value, plain)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_hash(model) -> str:
    """Names the weights of a MODEL's network without its LoRAs, by the signs of 512 numbers in each of 16 tensors, of a
    tensor that is packed (GGUF) by 512 of its bytes.

    Signs do not change when weights are loaded in half precision; a fine-tune turns some of those near 0. Weights
    packed in another way are others. "" for a network whose weights are packed in a form that is not known.
    """
    parameters = {
        name: one for name, one in network_of(model).named_parameters() if _is_plain_matrix(one) or _is_packed(one)
    }
    if not parameters:
        return ""
    matrices, digest = sorted(parameters), hashlib.sha256()
    for name in matrices[:: -(-len(matrices) // SAMPLED_TENSORS)]:
        kept = model.backup.get(f"diffusion_model.{name}")  # the weight of before a LoRA was added to it in place
        digest.update(_sign(parameters[name] if kept is None else kept.weight))
    return digest.hexdigest()[:16]


def patches_hash(model) -> str:
    """Names the LoRAs and other patches on a MODEL's weights and their strengths; UNPATCHED where there are none."""
    if not model.patches:
        return UNPATCHED
    digest = hashlib.sha256()
    keys = sorted(model.patches, key=str)
    shown = set(keys[:: -(-len(keys) // SAMPLED_TENSORS)])
    for key in keys:
        for strength, patch, strength_model, *_ in model.patches[key]:
            digest.update(f"{key} {float(strength):.6g} {float(strength_model):.6g}".encode())
            for tensor in _tensors(patch) if key in shown else ():
                digest.update(bytes((_sampled(tensor) > 0).tolist()))
    return digest.hexdigest()[:16]


def _tensors(patch) -> list[Tensor]:
    """The tensors of a weight patch, in whatever form the host keeps it."""
    if isinstance(patch, Tensor):
        return [patch] if patch.is_floating_point() and not patch.is_meta else []
    parts = patch if isinstance(patch, tuple | list) else getattr(patch, "weights", ())
    return [tensor for part in parts if part is not patch for tensor in _tensors(part)] if parts else []


def _is_plain_matrix(weight: Tensor) -> bool:
    return type(weight) is Parameter and weight.ndim > 1 and weight.is_floating_point() and not weight.is_meta


def _is_packed(weight: Tensor) -> bool:
    """Whether a weight is one of ComfyUI-GGUF's, a class of tensor that says how it is packed and for what shape."""
    return hasattr(weight, "tensor_type") and hasattr(weight, "tensor_shape") and not weight.is_meta


def _sign(weight: Tensor) -> bytes:
    """What a weight adds to the hash; a packed one is only read, and never unpacked."""
    if not _is_packed(weight):
        return bytes((_sampled(weight) > 0).tolist())
    stored = weight.as_subclass(Tensor)
    if stored.is_floating_point():  # F16 and F32 lie in such a file as they are
        return bytes((_sampled(stored) > 0).tolist())
    flat = stored.detach().reshape(-1)
    kept = flat[:: -(-len(flat) // SAMPLED_NUMBERS)].cpu().contiguous()
    return f"{weight.tensor_type} ".encode() + bytes(kept.view(torch.uint8).tolist())  # type: ignore[attr-defined]


def _sampled(weight: Tensor) -> Tensor:
    """Numbers at equal distances through a tensor, on the CPU; a view is cut before anything is copied."""
    flat = weight.detach().reshape(-1)
    return flat[:: -(-len(flat) // SAMPLED_NUMBERS)].float().cpu()


def pixels(model, latent: dict) -> tuple[int, int] | None:
    """Width and height in pixels of the picture that a LATENT of this MODEL becomes; None for audio with video."""
    return sampled(model, latent).size


def sampled(model, latent: dict | None) -> Sampled:
    """What of a LATENT, or of none, is sampled: an empty one of another ratio is resized by the host first."""
    latent_format = model.get_model_object("latent_format")
    if latent is None or is_nested(latent["samples"]):
        return Sampled(cell=pixels_a_side(latent_format))
    shape = as_sampled(model, latent).shape
    frames = shape[2] if len(shape) == 5 else 1
    return Sampled(pixels_of(latent_format, shape), frames, math.prod(shape[1:]), pixels_a_side(latent_format))


def as_sampled(model, latent: dict) -> Tensor:
    """The samples of a LATENT as the stock samplers take them: an empty one in this MODEL's channels and size."""
    ratios = [latent.get(SPACIAL), latent.get(TEMPORAL)]
    known = len(inspect.signature(comfy.sample.fix_empty_latent_channels).parameters) - 2
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios[: max(known, 0)])


def pixels_of(latent_format, shape: Sequence[int]) -> tuple[int, int] | None:
    """Width and height in pixels of a latent [b c h w]; None for one that is no picture (packed, audio)."""
    if len(shape) < 4:
        return None
    side = pixels_a_side(latent_format)
    return shape[-1] * side, shape[-2] * side


def pixels_a_side(latent_format) -> int:
    """How many pixels of the picture one latent pixel is wide and high."""
    known = (PIXELS_A_SIDE.get(one.__name__) for one in type(latent_format).__mro__)
    return getattr(latent_format, "spacial_downscale_ratio", None) or next(filter(None, known), 8)
