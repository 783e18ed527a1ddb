"""Golden noise from an NPNet: what it needs of a prompt and a latent, checked, and the samples one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.golden_noise import mix, refine_in_windows
from ...models.npnet import INSTEAD, NPNet, NPNetConfig
from .latents import latent_text

OTHER_SIZES = ("windows", "refuse")
LONG_PROMPTS = ("first part", "average")


@dataclass(frozen=True)
class GoldenSettings:
    """strength: 0 the plain noise, 1 the network's. other_sizes, long_prompt: see above. svd_on_cpu: the same picture
    on every machine, for libraries differ in the signs of singular vectors."""

    strength: float = 1.0
    other_sizes: str = "windows"
    long_prompt: str = "first part"
    svd_on_cpu: bool = True


def check_size(config: NPNetConfig, shape: tuple[int, ...], other_sizes: str) -> None:
    """ValueError unless the network can make noise of this shape [b c h w], or [b c 1 h w]."""
    if len(shape) not in (4, 5) or (len(shape) == 5 and shape[2] != 1):
        raise ValueError(
            f"Attune Golden Noise needs latents of pictures, [b c h w], but got {latent_text(shape)}. {INSTEAD}"
        )
    if shape[1] != config.channels:
        raise ValueError(
            f"This NPNet needs latents of {config.channels} channels, but this model's latent has {shape[1]}. {INSTEAD}"
        )
    if other_sizes == "refuse" and shape[-2:] != (config.side, config.side):
        raise ValueError(
            f"This NPNet was trained for {config.side} x {config.side} latents ({8 * config.side} x {8 * config.side} "
            f"px), but the sampler got {shape[-2]} x {shape[-1]}. Set 'other_sizes' to 'windows'."
        )


def golden_noise(
    net: NPNet, noise: Tensor, texts: list[Tensor], settings: GoldenSettings,
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Golden noise of the shape, dtype and device of `noise`; each sample with its own prompt, one after the other.

    One prompt serves the whole batch. A sample gives the same bits alone and in a batch. `before_each` may interrupt.
    """
    check_size(net.config, noise.shape, settings.other_sizes)
    if settings.strength == 0 or not noise.any():
        return noise
    flat = noise.squeeze(2) if noise.ndim == 5 else noise
    device = net.alpha.device
    svd_device = torch.device("cpu") if settings.svd_on_cpu else None
    found = []
    for i, sample in enumerate(flat.split(1)):
        before_each()
        prompts = [text[i % len(text)][None].to(device) for text in texts]

        def refine(x: Tensor, prompts: list[Tensor] = prompts) -> Tensor:
            return torch.stack([net(x, prompt, svd_device) for prompt in prompts]).mean(dim=0)

        golden = refine_in_windows(sample.to(device, torch.float32), net.config.side, refine)
        if not golden.isfinite().all():
            raise ValueError("The NPNet made noise that is not finite; its file may be damaged. Get the file again.")
        found.append(golden.to(noise))
    return mix(noise, torch.cat(found).reshape(noise.shape), settings.strength)
