"""Step schedules: check them, stretch them to other step counts, start them late for img2img."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .types import Sigmas


def check_sigmas(sigmas: Sigmas) -> Sigmas:
    """Return `sigmas` unchanged; ValueError unless they are finite, not negative and strictly decreasing."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"A schedule needs at least 2 noise levels in one row, but its shape is {list(sigmas.shape)}.")
    if not torch.isfinite(sigmas).all() or (sigmas < 0).any():
        i = int((~torch.isfinite(sigmas) | (sigmas < 0)).nonzero()[0])
        raise ValueError(f"Noise levels must be finite and not negative, but sigmas[{i}] = {float(sigmas[i]):.4g}.")
    if not (sigmas[:-1] > sigmas[1:]).all():
        i = int((sigmas[:-1] <= sigmas[1:]).nonzero()[0])
        raise ValueError(
            f"Noise levels must decrease, but sigmas[{i}] = {float(sigmas[i]):.4g} "
            f"is followed by {float(sigmas[i + 1]):.4g}."
        )
    return sigmas


def resample_loglinear(levels: Sigmas, steps: int) -> Sigmas:
    """Stretch the m+1 positive `levels` of an m-step schedule to `steps` steps: log(sigma) linear over the step index.

    The rule of the Align Your Steps how-to page (Sabour et al. 2024, arXiv 2404.14507). Both ends stay; `steps` = m
    returns the levels unchanged.
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step, but steps = {steps}.")
    if not (levels > 0).all():
        raise ValueError("Log-linear resampling needs positive noise levels: append the final 0 afterwards.")
    log_sigma = levels.double().log()  # [m+1]
    at = torch.linspace(0, len(levels) - 1, steps + 1, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(levels) - 2)
    return torch.lerp(log_sigma[low], log_sigma[low + 1], at - low).exp().to(levels.dtype)  # [steps+1]


def end_at_zero(sigmas: Sigmas) -> Sigmas:
    """Replace the last level by 0, as published schedules are run: the last step goes from sigmas[-2] to no noise."""
    return torch.cat([sigmas[:-1], torch.zeros_like(sigmas[-1:])])


def for_denoise(schedule: Callable[[int], Sigmas], steps: int, denoise: float) -> Sigmas:
    """The last `steps` steps of a schedule of int(steps / denoise): how ComfyUI runs img2img.

    denoise >= 1 is the whole schedule; denoise <= 0 is no step at all, an empty tensor.
    """
    if denoise <= 0:
        return torch.empty(0)
    total = steps if denoise >= 1 else int(steps / denoise)
    return schedule(total)[-(steps + 1) :]
