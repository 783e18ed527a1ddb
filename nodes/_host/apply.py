"""Put a calibration of any kind on a MODEL: what to sample with, the sampler, the levels, and what there is to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from ...models.calibration import NOISE_SHIFT, SCHEDULE, Calibration, refuse_unfit, size_text
from .._draw.noise_shift import draw_shift
from .._draw.propagation import draw_speeds
from .._draw.schedules import Curve, applied_curve, draw_schedules, profile_curve
from .._plan.noise_shift import shift_for
from .._plan.profile_on_model import REMEDY, apply_profile, doubts
from .conditioning import Remap, with_conditioning
from .identity import identify, pixels
from .noise_shift import with_noise_shift
from .propagation import with_calibration
from .sampling import run_stock_node
from .session import named_sampler

STEPS = 20  # where neither the user nor the profile says how many
STOCK = "simple"  # the schedule where the profile has none


@dataclass(frozen=True)
class Choice:
    """How a profile is put to use; see the inputs of Attune Apply Profile."""

    steps: int = 0
    denoise: float = 1.0
    denoise_mode: str = "exact"
    policy: str = "ignore"
    strength: float = 1.0
    speed: float = 0.0


@dataclass(frozen=True)
class Ready:
    """What a graph samples with; plot: draws what is applied."""

    model: Any
    sampler: Any
    sigmas: Tensor
    report: list[str]
    plot: Callable[[], Image.Image]


def put_to_use(model: Any, profile: Calibration, choice: Choice, latent: dict | None = None) -> Ready:
    """A MODEL with `profile` on it; ValueError, in the names on screen, where the profile does not fit the model."""
    if profile.kind == SCHEDULE:
        return _schedule(model, profile, choice, latent)
    refuse_unfit(profile, identify(model), REMEDY)
    if profile.kind == NOISE_SHIFT:
        return _shift(model, profile, choice, latent)
    return _propagation(model, profile, choice)


def _schedule(model: Any, profile: Calibration, choice: Choice, latent: dict | None) -> Ready:
    size = None if latent is None else pixels(model, latent)
    applied = apply_profile(
        profile, identify(model, weights=True), choice.steps, choice.denoise, choice.denoise_mode, choice.policy, size,
        choice.strength,
    )  # fmt: skip
    out = model
    if applied.conditioning is not None:
        out = with_conditioning(model, Remap(profile.name, applied.conditioning, applied.solver, profile.cfg))

    def plot() -> Image.Image:
        steps = len(applied.sigmas) - 1
        if steps < 1:
            return draw_schedules([profile_curve(profile)], profile.name)
        stock = Curve(f"stock '{STOCK}'", tuple(_stock(model, steps, choice.denoise).tolist()))
        return draw_schedules([applied_curve(applied), stock], profile.name)

    return Ready(out, named_sampler(profile.solver or "euler"), applied.sigmas, applied.report, plot)


def _shift(model: Any, profile: Calibration, choice: Choice, latent: dict | None) -> Ready:
    size = None if latent is None else pixels(model, latent)
    asked = [one.resolution for one in profile.alignments] if size is None else [size]
    steps = choice.steps or STEPS
    report = [
        f"Noise shift '{profile.name}' at strength {choice.strength:g}. Every run gets its own size's.",
        *(shift_for(profile, one, choice.strength)[1] for one in asked),
        *doubts(profile, identify(model, weights=True)),
        f"It has no schedule of its own: SIGMAS are {steps} steps of the stock '{STOCK}', SAMPLER is euler.",
    ]
    sigmas = _stock(model, steps, choice.denoise)
    shifted = with_noise_shift(model, profile, choice.strength)
    return Ready(shifted, named_sampler("euler"), sigmas, report, lambda: draw_shift(profile))


def _propagation(model: Any, profile: Calibration, choice: Choice) -> Ready:
    about = identify(model, weights=True)
    patched, chosen, said = with_calibration(model, profile, choice.speed or None)
    sigmas = apply_profile(_levels_alone(profile), about, choice.steps, choice.denoise, choice.denoise_mode).sigmas
    report = [
        f"Propagation '{profile.name}', measured at {size_text(profile.resolution)}.",
        *said,
        *doubts(profile, about),
    ]
    assert profile.key_steps is not None
    points = profile.key_steps.points
    return Ready(patched, named_sampler(profile.solver or "euler"), sigmas, report, lambda: draw_speeds(points, chosen))


def _levels_alone(profile: Calibration) -> Calibration:
    """The schedule that a calibration of propagation was measured on."""
    return replace(profile, kind=SCHEDULE, key_steps=None)


def _stock(model: Any, steps: int, denoise: float) -> Tensor:
    (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=STOCK, steps=steps, denoise=denoise)
    return sigmas
