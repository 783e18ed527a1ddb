"""Step schedules: check them, stretch them to other step counts, start them late for img2img."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .space import NoiseSpace
from .types import Sigma, Sigmas


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


def resample_loglinear(levels: Sigmas, steps: int, denoise: float = 1.0) -> Sigmas:
    """Stretch the m+1 positive `levels` of an m-step schedule to `steps` steps: log(sigma) linear over the step index.

    The rule of the Align Your Steps how-to page (Sabour et al. 2024, arXiv 2404.14507). Both ends stay; `steps` = m
    returns the levels unchanged. `denoise` below 1 spends all steps on that share of the index at the end.
    """
    if not (levels > 0).all():
        raise ValueError("Log-linear resampling needs positive noise levels: append the final 0 afterwards.")
    log_sigma = levels.double().log()  # [m+1]
    at = _places(len(levels) - 1, steps, denoise)
    low = at.floor().long().clamp(max=len(levels) - 2)
    return torch.lerp(log_sigma[low], log_sigma[low + 1], at - low).exp().to(levels.dtype)  # [steps+1]


def resample_theta(sigmas: Sigmas, steps: int, space: NoiseSpace, denoise: float = 1.0) -> Sigmas:
    """Stretch an m-step schedule to `steps` steps: a monotone cubic through its angles over the step index.

    The angle atan2(sigma, alpha) is finite at 0 and at a flow's 1, so a schedule that ends in 0 is stretched whole.
    The curve passes through every level: `steps` = m returns them to the bit, a multiple of m keeps them. `denoise`
    below 1 spends all steps on that share of the index at the end.
    """
    at = _places(len(sigmas) - 1, steps, denoise)
    level = sigmas.double()
    between = space.at_angle(_monotone_cubic(space.angle(level), at))
    nearest = at.round().long()
    return torch.where((at - nearest).abs() < 1e-9, level[nearest], between).to(sigmas.dtype)  # [steps+1]


def _places(native: int, steps: int, denoise: float) -> Sigma:
    """Where `steps` + 1 levels lie on the step index 0..`native` of a schedule, [steps+1]."""
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step, but steps = {steps}.")
    return torch.linspace(native * (1 - min(denoise, 1.0)), native, steps + 1, dtype=torch.float64)


def _monotone_cubic(y: Sigma, at: Sigma) -> Sigma:
    """The values at `at` of the monotone cubic through y over 0..m (PCHIP, Fritsch and Butland 1984)."""
    step = y.diff()  # [m]
    if len(step) == 1:
        return torch.lerp(y[0], y[1], at)
    mean = 2 * step[:-1] * step[1:] / (step[:-1] + step[1:])  # harmonic: 0 where a step is flat
    inner = torch.where(step[:-1] * step[1:] > 0, mean, torch.zeros_like(mean))
    slope = torch.cat([_end_slope(step[0], step[1]), inner, _end_slope(step[-1], step[-2])])  # [m+1]
    low = at.floor().long().clamp(0, len(step) - 1)
    t = at - low
    return (
        (2 * t**3 - 3 * t**2 + 1) * y[low] + (t**3 - 2 * t**2 + t) * slope[low]
        + (3 * t**2 - 2 * t**3) * y[low + 1] + (t**3 - t**2) * slope[low + 1]
    )  # fmt: skip


def _end_slope(near: Sigma, far: Sigma) -> Sigma:
    """The slope at an end from its two steps, three-point formula, limited to keep the curve monotone; [1]."""
    slope = (3 * near - far) / 2
    if slope * near <= 0:
        slope = torch.zeros_like(near)
    elif near * far <= 0 and slope.abs() > 3 * near.abs():
        slope = 3 * near
    return slope[None]


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


def exactly_for_denoise(resample: Callable[[int, float], Sigmas], steps: int, denoise: float) -> Sigmas:
    """`steps` steps on the last `denoise` of a schedule's step index: continuous in `denoise`.

    Equals `for_denoise` where steps / denoise is a whole number; elsewhere that rounds and its start jumps.
    """
    return resample(steps, denoise) if denoise > 0 else torch.empty(0)


def truncated_for_denoise(schedule: Callable[[int], Sigmas], steps: int, denoise: float) -> Sigmas:
    """The last round(steps * denoise) steps of a schedule of `steps`, as ComfyUI's Align Your Steps node has it.

    Where that rounds to no step it is empty; the node's single 0 would let a sampler hand back its input unsaid.
    """
    kept = round(steps * min(max(denoise, 0.0), 1.0))
    return schedule(steps)[-(kept + 1) :] if kept else torch.empty(0)
