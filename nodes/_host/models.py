"""What a MODEL tells about itself."""

from __future__ import annotations

import comfy.model_sampling

from ...models.schedules import NoiseRange


def noise_range(model) -> NoiseRange:
    """Family, noise space and levels of a MODEL, with every patch of its chain applied (ModelSampling… nodes too)."""
    sampling = model.get_model_object("model_sampling")
    config = type(model.model.model_config)
    return NoiseRange(
        families=tuple(c.__name__ for c in config.__mro__ if c.__module__ != "builtins"),
        space="flow" if isinstance(sampling, comfy.model_sampling.CONST) else "ve",
        sigma_min=float(sampling.sigma_min),
        sigma_max=float(sampling.sigma_max),
    )


def pixels(model, latent: dict) -> tuple[int, int] | None:
    """Width and height in pixels of the picture that a LATENT of this MODEL becomes; None for audio with video."""
    if getattr(latent["samples"], "is_nested", False):
        return None
    scale = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    height, width = latent["samples"].shape[-2:]
    return width * scale, height * scale
