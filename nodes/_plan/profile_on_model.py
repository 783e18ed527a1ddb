"""What a profile means for a model at hand: its levels, its conditioning map, or the sentence that refuses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...kernels.conditioning import ConditioningMap
from ...kernels.schedules import check_sigmas, exactly_for_denoise, for_denoise, truncated_for_denoise
from ...kernels.types import Sigmas
from ...models.calibration import (
    SCHEDULE,
    Calibration,
    CondLevels,
    ModelIdentity,
    Planned,
    conditioning_map,
    misfits,
    refuse_unfit,
    same_size,
    size_text,
)
from .named_schedules import resample_profile
from .noise_shift import times_the_true

DENOISE_MODES: dict[str, Callable[..., Sigmas]] = {
    "exact": exactly_for_denoise,
    "comfy": for_denoise,
    "ays": truncated_for_denoise,
}
POLICIES = ("ignore", "shift", "strict")
REMEDY = "Choose a profile for this model, or fit one with Attune Fit Sampler."


@dataclass(frozen=True)
class Applied:
    """The levels to sample with, float32 [n+1] or empty; what the network is told; and what there is to say.

    solver: the sampler that `conditioning` is bound to, "" for every one.
    """

    sigmas: Sigmas
    conditioning: ConditioningMap | None
    solver: str
    report: list[str]


def apply_profile(
    profile: Calibration, model: ModelIdentity, steps: int = 0, denoise: float = 1.0, mode: str = "exact",
    policy: str = "ignore", resolution: tuple[int, int] | None = None, strength: float = 1.0,
) -> Applied:  # fmt: skip
    """The levels of `profile` at `steps` (0: its own count) and `denoise`, moved to `resolution`, then its map.

    Levels first, shift second, map last and as a function of the true level: so it holds for every level that the
    others produce. ValueError, in the names on screen, when the profile does not fit the model at all; a map that does
    not fit is left out and the report says why.
    """
    refuse_unfit(profile, model, REMEDY, (SCHEDULE,))
    report = [f"Profile '{profile.name}' ({profile.method})."]
    if mode not in DENOISE_MODES:
        raise ValueError(f"There is no denoise mode '{mode}'. Choose one of: {', '.join(DENOISE_MODES)}.")
    sigmas = DENOISE_MODES[mode](partial(resample_profile, profile), steps or profile.steps, denoise)
    sigmas, said = _at_resolution(sigmas, profile, model, policy, resolution)
    sigmas = sigmas.float()
    report += said
    if len(sigmas):
        check_sigmas(sigmas)
        report.append(f"{len(sigmas) - 1} steps: {listed(sigmas)}.")
        if sigmas[0] < model.sigma_max * 0.99 and denoise >= 1:
            report.append(f"Note: it starts at sigma {sigmas[0]:.4g}, below this model's {model.sigma_max:.4g}.")
    else:
        report.append("There is no step to sample, because 'denoise' is too low: the latent comes back as it is.")
    conditioning, solver, said = _conditioning(profile, model, resolution, strength)
    return Applied(sigmas, conditioning, solver, report + said + doubts(profile, model, Planned(steps=steps)))


def _at_resolution(
    sigmas: Sigmas, profile: Calibration, model: ModelIdentity, policy: str, resolution: tuple[int, int] | None
) -> tuple[Sigmas, list[str]]:
    """Levels for another picture size: the same corruption needs a noise that grows with the square root of pixels."""
    if policy not in POLICIES:
        raise ValueError(f"There is no resolution policy '{policy}'. Choose one of: {', '.join(POLICIES)}.")
    if resolution is None:
        if policy != "ignore":
            raise ValueError(f"'resolution_policy' is '{policy}', which needs the picture's size: connect 'latent'.")
        return sigmas, []
    if same_size(resolution, profile.resolution):
        return sigmas, []
    made, wanted = size_text(profile.resolution), size_text(resolution)
    if policy == "strict":
        raise ValueError(
            f"The profile '{profile.name}' was made at {made}, but the latent is {wanted}. Choose a profile for this "
            "size, or set 'resolution_policy' to 'shift' or 'ignore'."
        )
    if policy == "ignore":
        said = f"Note: the profile was made at {made}, but the latent is {wanted}; its levels are used unchanged."
        return sigmas, [said]
    grow = math.sqrt(math.prod(resolution) / math.prod(profile.resolution))
    shifted = _shifted(sigmas, grow, 1.0 if profile.space == "flow" else model.sigma_max)
    return shifted, [f"Levels shifted by {grow:.3g} from {made} to {wanted}."]


def _shifted(sigmas: Sigmas, factor: float, top: float) -> Sigmas:
    """Levels times `factor` where they are small, with 0 and `top` fixed: on flow (top 1) the shift of SD3.

    On VE a plain product would leave the model's range; this approaches its top without reaching it.
    """
    return factor * sigmas / (1 + (factor - 1) * sigmas / top)


def _conditioning(
    profile: Calibration, model: ModelIdentity, resolution: tuple[int, int] | None, strength: float
) -> tuple[ConditioningMap | None, str, list[str]]:
    """The map of the alignment nearest in size, the solver it is bound to, and what there is to say."""
    if not profile.alignments:
        return None, "", []
    wanted = resolution or profile.resolution
    nearest = min(profile.alignments, key=lambda one: abs(math.log(math.prod(one.resolution) / math.prod(wanted))))
    if strength == 0:
        return None, "", ["Timestep alignment off: 'strength' is 0."]
    if profile.prediction and model.prediction and profile.prediction != model.prediction:
        reason = f"made for {profile.prediction} prediction, but this MODEL has {model.prediction}"
        return None, "", [f"Schedule applied, timestep alignment skipped: {reason}."]
    return conditioning_map(profile, nearest, strength), nearest.solver, [_said_of(nearest, strength)]


def _said_of(alignment: CondLevels, strength: float) -> str:
    ratios = [b / a for a, b in zip(alignment.sigma, alignment.sigma_cond, strict=True)]
    bound = f" with {alignment.solver} only; another sampler runs without it" if alignment.solver else ""
    return (
        f"Timestep alignment at strength {strength:g}: at strength 1 the network is told "
        f"{times_the_true(min(ratios), max(ratios))} sigma{bound}."
    )


def doubts(profile: Calibration, model: ModelIdentity, run: Planned | None = None) -> list[str]:
    """What does not forbid the profile, but makes its measured gain uncertain; then what it was fitted for."""
    notes = [f"Note: {one}" for one in misfits(profile, model, run) if not one.fatal]
    if profile.solver:
        guidance = "" if profile.cfg is None else f" at cfg {profile.cfg:g}"
        notes.append(f"Fitted for {profile.solver}{guidance}.")
    return notes


def listed(sigmas: Sigmas) -> str:
    shown = sigmas if len(sigmas) <= 24 else sigmas[[0, 1, -3, -2, -1]]
    return " ".join(f"{float(s):.4g}" for s in shown)
