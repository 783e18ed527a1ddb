"""What a MODEL tells about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import comfy.model_sampling

from ...models.schedules import NoiseRange

DISTILLED = {"LCM", "ModelSamplingDiscreteDistilled"}


def noise_range(model) -> NoiseRange:
    """Family, noise space and levels of a MODEL, with every patch of its chain applied (ModelSampling… nodes too)."""
    sampling = model.get_model_object("model_sampling")
    config = type(model.model.model_config)
    return NoiseRange(
        families=tuple(c.__name__ for c in config.__mro__ if c.__module__ != "builtins"),
        space="flow" if isinstance(sampling, comfy.model_sampling.CONST) else "ve",
        sigma_min=float(sampling.sigma_min),
        sigma_max=float(sampling.sigma_max),
        prediction=prediction(sampling),
        config_hash=config_hash(model.model.model_config.unet_config),
        shift=getattr(sampling, "shift", None),
    )


def is_distilled(sampling) -> bool:
    """Whether a model_sampling is one for models that were distilled for a few timesteps of their own."""
    return any(one.__name__ in DISTILLED for one in type(sampling).__mro__)


def prediction(sampling) -> str:
    """What the network of a model_sampling predicts: "eps", "v", "edm", "x0" or "flow"; else the host's class name."""
    names = {"CONST": "flow", "X0": "x0", "EDM": "edm", "V_PREDICTION": "v", "EPS": "eps"}
    for one in type(sampling).__mro__:
        if one.__module__ == comfy.model_sampling.__name__ and one.__name__ in names:
            return names[one.__name__]
    return type(sampling).__mro__[-2].__name__.lower()


def config_hash(unet_config: dict) -> str:
    """Names the architecture: the same at every precision and for every file."""
    plain = (str, int, float, list, tuple, type(None))
    facts = {key: value for key, value in unet_config.items() if isinstance(value, plain)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def pixels(model, latent: dict) -> tuple[int, int] | None:
    """Width and height in pixels of the picture that a LATENT of this MODEL becomes; None for audio with video."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        return None
    return pixels_of(model.get_model_object("latent_format"), samples.shape)


def pixels_of(latent_format, shape: Sequence[int]) -> tuple[int, int] | None:
    """Width and height in pixels of a latent [b c … h w]; None for one that is no picture (packed, audio)."""
    if len(shape) < 4:
        return None
    scale = getattr(latent_format, "spacial_downscale_ratio", 8)
    return shape[-1] * scale, shape[-2] * scale
