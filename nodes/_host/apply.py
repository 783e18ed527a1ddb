"""Put a calibration of any kind on a MODEL: what to sample with, the sampler, the levels, and what there is to say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...models.calibration import (
    ATTENTION,
    NOISE_SHIFT,
    SAMPLER,
    SCHEDULE,
    Calibration,
    Planned,
    Point,
    ShortRun,
    refuse_unfit,
    size_text,
)
from .._plan.fitted_sampler import best_run, proved
from .._plan.makers import Sampled, beside_noise_shift
from .._plan.noise_shift import shift_for
from .._plan.profile_on_model import REMEDY, Applied, apply_profile, doubts
from .attention import levels_of_profile, with_attention
from .conditioning import Remap, with_conditioning
from .fitted_sampler import fitted_sampler_of
from .identity import identify, pixels, sampled
from .noise_shift import with_noise_shift
from .propagation import with_calibration
from .session import named_sampler
from .solvers import run_stock_node

USUAL_STEPS = 20  # where neither the user nor the profile says how many
STOCK = "simple"  # the schedule where the profile has none


@dataclass(frozen=True)
class Use:
    """How a profile is put to use; see the inputs of Attune Apply Profile."""

    steps: int = 0
    denoise: float = 1.0
    denoise_mode: str = "exact"
    policy: str = "ignore"
    strength: float = 1.0
    speed: float = 0.0
    fidelity: float = 0.0


@dataclass(frozen=True)
class Ready:
    """What a graph samples with; applied: of a schedule; point: the setting that runs, of propagation; short: of a
    fitted sampler."""

    model: Any
    sampler: Any
    sigmas: Tensor
    report: list[str]
    applied: Applied | None = None
    point: Point | None = None
    short: ShortRun | None = None


def put_to_use(model: Any, profile: Calibration, choice: Use, latent: dict | None = None) -> Ready:
    """A MODEL with `profile` on it; ValueError, in the names on screen, where the profile does not fit the model."""
    if profile.kind == SCHEDULE:
        return _schedule(model, profile, choice, latent)
    refuse_unfit(profile, identify(model), REMEDY)
    if profile.kind == NOISE_SHIFT:
        return _shift(model, profile, choice, latent)
    if profile.kind == SAMPLER:
        return _fitted(model, profile, choice, latent)
    if profile.kind == ATTENTION:
        return _attention(model, profile, choice)
    return _propagation(model, profile, choice)


def _schedule(model: Any, profile: Calibration, choice: Use, latent: dict | None) -> Ready:
    size = None if latent is None else pixels(model, latent)
    applied = apply_profile(
        profile, identify(model, weights=True), choice.steps, choice.denoise, choice.denoise_mode, choice.policy, size,
        choice.strength,
    )  # fmt: skip
    out = model
    if applied.conditioning is not None:
        out = with_conditioning(model, Remap(profile.name, applied.conditioning, applied.solver, profile.cfg))
    return Ready(out, named_sampler(profile.solver or "euler"), applied.sigmas, applied.report, applied)


def _shift(model: Any, profile: Calibration, choice: Use, latent: dict | None) -> Ready:
    made = Sampled() if latent is None else sampled(model, latent)
    asked = [one.resolution for one in profile.alignments] if made.size is None else [made.size]
    steps = choice.steps or USUAL_STEPS
    report = [
        f"Noise shift '{profile.name}' at strength {choice.strength:g}. Every run gets its own size's.",
        *(shift_for(profile, one, choice.strength)[1] for one in asked),
        *doubts(profile, identify(model, weights=True)),
        *beside_noise_shift(profile, made),
        f"It has no schedule of its own: SIGMAS are {steps} steps of the stock '{STOCK}', SAMPLER is euler.",
    ]
    sigmas = stock_levels(model, steps, choice.denoise)
    shifted = with_noise_shift(model, profile, choice.strength)
    return Ready(shifted, named_sampler("euler"), sigmas, report)


def _propagation(model: Any, profile: Calibration, choice: Use) -> Ready:
    about = identify(model, weights=True)
    patched, chosen, said = with_calibration(model, profile, choice.speed or None, choice.fidelity)
    measured_on = replace(profile, kind=SCHEDULE, key_steps=None)
    sigmas = apply_profile(measured_on, about, choice.steps, choice.denoise, choice.denoise_mode).sigmas
    report = [
        f"Propagation '{profile.name}', measured at {size_text(profile.resolution)}.",
        *said,
        *doubts(profile, about),
    ]
    return Ready(patched, named_sampler(profile.solver or "euler"), sigmas, report, point=chosen)


def _attention(model: Any, profile: Calibration, choice: Use) -> Ready:
    fast, about = levels_of_profile(profile), identify(model, weights=True)
    measured_on = replace(profile, kind=SCHEDULE, key_steps=None)
    sigmas = apply_profile(measured_on, about, choice.steps, choice.denoise, choice.denoise_mode).sigmas
    report = [
        f"Attention '{profile.name}': '{fast.kernel}' from sigma {fast.highest:.4g} down to {fast.lowest:.4g}, exact "
        "before and after.",
        *doubts(profile, about),
    ]
    return Ready(with_attention(model, fast), named_sampler(profile.solver or "euler"), sigmas, report)


def _fitted(model: Any, profile: Calibration, choice: Use, latent: dict | None) -> Ready:
    if choice.denoise < 1:
        raise ValueError(
            f"'{profile.name}' is a fitted sampler: it starts where the run that it stands for started. Set 'denoise' "
            "to 1, or let Attune Fast Sampler learn the run with your 'denoise'."
        )
    short = best_run(profile, choice.steps)
    size = None if latent is None else pixels(model, latent)
    report = [
        f"Fitted sampler '{profile.name}', {profile.steps} steps in {short.run.steps}.",
        "Connect both SAMPLER and SIGMAS.",
        f"Proved: {proved(short)}.",
        *doubts(profile, identify(model, weights=True), Planned(size=size)),
    ]
    return Ready(model, fitted_sampler_of(short.run), torch.tensor(short.run.sigmas), report, short=short)


def stock_levels(model: Any, steps: int, denoise: float) -> Tensor:
    """The stock schedule, for what has none and to compare with."""
    (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=STOCK, steps=steps, denoise=denoise)
    return sigmas
