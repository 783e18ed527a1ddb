"""Pictures of schedules: noise levels over the run on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ...models.calibration import Calibration, conditioning_map
from .._plan.named_schedules import resample_profile
from .._plan.profile_on_model import Applied
from .axes import COLOURS, HEIGHT, INK, LEFT, Axes, font, sheet

LOWEST_DRAWN = 1e-6  # smaller levels are drawn here


@dataclass(frozen=True)
class Curve:
    """Levels of one run, the last may be 0; `told`: what the network is told at each of them, or None."""

    label: str
    sigmas: tuple[float, ...]
    told: tuple[float, ...] | None = None


def profile_curve(profile: Calibration) -> Curve:
    """The levels of a profile's native run, or the knots of its first alignment, and what the network is told there."""
    aligned = profile.alignments[0] if profile.alignments else None
    if profile.sigmas:
        sigmas = tuple(resample_profile(profile, profile.steps).tolist())
    else:
        sigmas = tuple(reversed(aligned.sigma if aligned else ()))
    told = None
    if aligned is not None:
        told = tuple(conditioning_map(profile, aligned)(torch.tensor(sigmas, dtype=torch.float64)).tolist())
    return Curve(profile.name, sigmas, told)


def applied_curve(applied: Applied) -> Curve:
    """The levels that will be run, and what the network is told at each."""
    told = applied.conditioning
    heard = None if told is None else tuple(told(applied.sigmas.double()).tolist())
    return Curve("this profile", tuple(applied.sigmas.tolist()), heard)


def draw_schedules(curves: Sequence[Curve], title: str = "Noise levels") -> Image.Image:
    """The curves over the share of the run, one dot a level; what the network is told is dashed.

    The axis ends one tick below the lowest positive level; a final 0 is drawn on the baseline.
    """
    picture, draw = sheet()
    positive = [s for curve in curves for s in (*curve.sigmas, *(curve.told or ())) if s > 0 and math.isfinite(s)]
    if not positive:
        draw.text((LEFT, HEIGHT // 2), "No noise levels: the run has no step.", INK, font(18))
        return picture
    low = math.log10(max(min(positive), LOWEST_DRAWN)) - 0.25
    high = max(math.log10(max(positive)), low + 0.5) + 0.08
    axes = Axes(draw, (0, 1), (low, high))
    shares = [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
    levels = [(low, "0"), *((math.log10(tick), f"{tick:g}") for tick in _ticks(low, high))]
    axes.frame(shares, levels, title, "share of the run's steps", "sigma")
    rows = []
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        if curve.told is not None:
            axes.curve(_points(curve.told, low), colour, dashed=True)
            rows.append((f"{curve.label}: told to the network", colour, True))
        axes.curve(_points(curve.sigmas, low), colour, dots=4)
        rows.append((curve.label, colour, False))
    axes.legend(sorted(rows, key=lambda row: row[2]))
    return picture


def _points(sigmas: Sequence[float], low: float) -> list[tuple[float, float]]:
    steps = max(len(sigmas) - 1, 1)
    return [(i / steps, math.log10(s) if s > 0 else low) for i, s in enumerate(sigmas)]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade while they are few, else 1 alone; never so near the baseline as to touch its 0."""
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [step * 10.0**decade for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if low + 0.05 * (high - low) < math.log10(tick) <= high]
