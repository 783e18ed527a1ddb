"""Plots of what the nodes measure, fit and choose; `axes` draws their frames and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...kernels.refine import kept_up_to, signal_to_noise
from ...kernels.space import NoiseSpace
from ...kernels.training_noise import Levels
from ...models.calibration import Calibration, Point, ShortRun, Size, conditioning_map
from .._plan.named_schedules import resample_profile
from .._plan.noise_shift import noise_word, shift_for
from .._plan.profile_on_model import Applied
from .._plan.propagation import FIDELITY
from .axes import COLOURS, FAINT, HEIGHT, INK, LEFT, Axes, Box, Colour, font, line, sheet

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


def draw_learned(long: Sequence[float], runs: Sequence[ShortRun]) -> Image.Image:
    """The levels of a long run, and of the short ones that were learned from it by now."""
    curves = [Curve(f"{one.run.steps} evaluations: {one.psnr:.1f} dB", one.run.sigmas) for one in runs]
    title = "Learned" if runs else "Learning"
    return draw_schedules([Curve(f"{len(long) - 1} steps", tuple(long)), *curves], title)


def _points(sigmas: Sequence[float], low: float) -> list[tuple[float, float]]:
    steps = max(len(sigmas) - 1, 1)
    return [(i / steps, math.log10(s) if s > 0 else low) for i, s in enumerate(sigmas)]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade while they are few, else 1 alone; never so near the baseline as to touch its 0."""
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [step * 10.0**decade for decade in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if low + 0.05 * (high - low) < math.log10(tick) <= high]


DECIBELS = (-30.0, 50.0)
CURVE_POINTS = 80


def draw_detail(starts: Sequence[tuple[str, float]], side: int) -> Image.Image:
    """Curves of named starts, by their noise over signal: dB over detail from the whole side to two latent pixels.

    For a picture with 1/f amplitude, as photographs have on average; where a curve falls below 0 noise covers it.
    """
    picture, draw = sheet()
    finest = math.log10(side / 2)
    axes = Axes(draw, (0, finest), DECIBELS)
    sizes = [(math.log10(f), f"1/{f}" if f > 1 else "1") for f in (1, 2, 4, 8, 16, 32, 64) if f <= side / 2]
    levels = [(float(db), f"{db}") for db in range(-30, 51, 10)]
    axes.frame(sizes, levels, "Detail that the start keeps", "size of detail, as a part of the picture's side", "dB")
    line(draw, [axes.at(0, 0), axes.at(finest, 0)], INK, dashed=True)
    rows = []
    for i, (label, r) in enumerate(starts):
        colour, snr = COLOURS[i % len(COLOURS)], signal_to_noise(r, side)
        shares = [finest * j / CURVE_POINTS for j in range(CURVE_POINTS + 1)]
        axes.curve([(x, 10 * math.log10(snr(10**x))) for x in shares], colour)
        f = kept_up_to(r, side)
        rows.append((f"{label}: {_kept(f, side)}", colour, False))
    axes.legend(rows)
    if not starts:
        draw.text(axes.at(0.1, 0), "No schedule with a step is connected.", INK, font(18))
    return picture


def _kept(f: float, side: int) -> str:
    if f >= side / 2:
        return "all is kept"
    return "nothing is kept" if f < 1 else f"kept above 1/{f:.2g} of the side"


LEAST_REACH = math.log(1.25)  # the axis shows at least ratios from 1/1.25 to 1.25
RATIOS = (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 8)
LEVELS = {
    "flow": (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999),
    "ve": (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
}


def draw_shift(profile: Calibration) -> Image.Image:
    """The ratio told / true of a flow's odds or of sigma, over sigma, with dots at the calibrated levels."""
    curves = {one.resolution: shift_for(profile, one.resolution)[0] for one in profile.alignments}
    ends = [at for curve in curves.values() for at in curve.at]
    offsets = [offset for curve in curves.values() for offset in curve.offset]
    picture, axes = _ratios(profile.space, ends, offsets, profile.name)
    rows = []
    for i, (size, curve) in enumerate(curves.items()):
        colour, dashed = COLOURS[i % len(COLOURS)], i >= len(COLOURS)
        points = list(zip(curve.at, curve.offset, strict=True))
        axes.curve(points, colour, dashed)
        axes.curve(points[1:-1], colour, dashed, dots=3)
        rows.append(("x".join(map(str, size)), colour, dashed))
    axes.legend(rows)
    return picture


def draw_search(least: dict[float, float], space: NoiseSpace, size: Size) -> Image.Image:
    """The offset with the least loss at each level that is done, of a fit that goes on."""
    points = [(_place(sigma, space.kind), offset) for sigma, offset in least.items()]
    whole = [_place(sigma, space.kind) for sigma in (LEVELS[space.kind][0], LEVELS[space.kind][-1])]
    title = f"Best so far, {'x'.join(map(str, size))}"
    picture, axes = _ratios(space.kind, whole, [offset for _, offset in points], title)
    axes.curve(points, COLOURS[0], dots=4)
    return picture


def _place(sigma: float, space: str) -> float:
    """Where a level stands on the axis."""
    return math.log(sigma / (1 - sigma) if space == "flow" else sigma)


def _ratios(space: str, ends: list[float], offsets: list[float], title: str) -> tuple[Image.Image, Axes]:
    """Paper with axes for the ratio told / true over sigma, and the line of what is told truly."""
    picture, draw = sheet()
    reach = 1.1 * max(LEAST_REACH, *map(abs, offsets))
    axes = Axes(draw, (min(ends), max(ends)), (-reach, reach))
    levels = [(_place(sigma, space), f"{sigma:g}") for sigma in LEVELS[space]]
    ratios = [(math.log(ratio), f"{ratio:g}") for ratio in RATIOS if abs(math.log(ratio)) <= reach]
    levels = [(at, text) for at, text in levels if axes.x[0] <= at <= axes.x[1]]
    axes.frame(levels, ratios, title, "sigma", f"told / true {noise_word(space)}")
    line(draw, [axes.at(axes.x[0], 0), axes.at(axes.x[1], 0)], INK)
    return picture, axes


SHEET_WIDTH, SHEET_HEIGHT = 1280, 480
CHANGES, CURVE = (80, 60, 620, 400), (740, 60, 1250, 400)  # the two panels
SECOND_ALONE = (80, 60, 590, 400)  # the second without the first
KEY_STEP = (255, 225, 170)


def draw_calibration(
    changes: Mapping[str, Sequence[float]], steps: int, points: Sequence[Point], chosen: Point | None
) -> Image.Image:
    """Left the change of every feature per step, with the chosen key steps; right fidelity over speed, where a setting
    was tried."""
    picture, draw = sheet(SHEET_WIDTH, SHEET_HEIGHT)
    values = [value for row in changes.values() for value in row if value > 0] or [0.1, 1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    axes = Axes(draw, (0, max(steps - 1, 1)), (low, high), CHANGES)
    for key in chosen.keys if chosen else ():
        draw.line((*axes.at(key, low), *axes.at(key, high)), KEY_STEP, 5)
    axes.frame(
        [(step, str(step)) for step in range(0, steps, max(1, steps // 8))],
        [(decade, f"{10.0**decade:g}") for decade in range(low, high + 1)],
        "Change of each feature from the step before", "step; bars: the chosen key steps", "relative",
    )  # fmt: skip
    rows = []
    for n, (name, row) in enumerate(changes.items()):
        colour = _colour(n, len(changes))
        axes.curve([(i, math.log10(max(value, 1e-9))) for i, value in enumerate(row, start=1)], colour)
        rows.append((name, colour, False))
    axes.legend(rows[:: max(1, len(rows) // 8)])
    if chosen:
        _speeds(draw, points, chosen, CURVE)
    return picture


def draw_speeds(points: Sequence[Point], chosen: Point | None, wanted: float = FIDELITY) -> Image.Image:
    """Fidelity over speed alone, of a profile that is applied; chosen: None where none is as faithful as wanted."""
    picture, draw = sheet(SHEET_WIDTH // 2, SHEET_HEIGHT)
    _speeds(draw, points, chosen, SECOND_ALONE, wanted)
    return picture


def _speeds(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], chosen: Point | None, box: Box, wanted: float = FIDELITY
) -> None:
    levels = [wanted, *(point.psnr for point in points)]
    low, high = 10 * math.floor(min(levels) / 10), 10 * math.ceil(max(levels) / 10 + 0.01)
    fastest = math.ceil(4 * max(point.speed for point in points)) / 4 + 0.25
    axes = Axes(draw, (1.0, fastest), (low, high), box)
    quarters = range(4, round(4 * fastest) + 1, max(1, round(fastest) - 1))
    axes.frame(
        [(n / 4, f"{n / 4:g}") for n in quarters], [(db, str(db)) for db in range(low, high + 1, 10)],
        "Fidelity to the run without reuse",
        f"times less computing; {'every step runs whole' if chosen is None else 'ring: the setting that runs'}", "dB",
    )  # fmt: skip
    axes.curve([(axes.x[0], wanted), (fastest, wanted)], COLOURS[4], dashed=True)
    axes.curve([(point.speed, point.psnr) for point in points], COLOURS[0], dots=4)
    if chosen is None:
        return
    x, y = axes.at(chosen.speed, chosen.psnr)
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), outline=INK, width=3)


def _colour(n: int, count: int) -> Colour:
    """From blue (the first feature) to red (the last)."""
    share = n / max(count - 1, 1)
    return (int(20 + 180 * share), int(70 + 30 * math.sin(math.pi * share)), int(190 - 160 * share))


def draw_errors(errors: Sequence[float], exact: Sequence[int] | None) -> Image.Image:
    """The change of the guided answer by step, the steps that keep exact attention shaded; None: all of them."""
    picture, draw = sheet()
    heights = [math.log10(max(error, 1e-9)) for error in errors]
    low, high = math.floor(min(heights)), math.ceil(max(heights) + 1e-9)
    axes = Axes(draw, (-0.5, len(errors) - 0.5), (low, max(high, low + 1)))
    for i in range(len(errors)) if exact is None else exact:
        (left, top), (right, bottom) = axes.at(i - 0.5, axes.y[1]), axes.at(i + 0.5, low)
        draw.rectangle((left, top, right, bottom), FAINT)
    axes.frame(
        [(i, str(i)) for i in range(0, len(errors), max(1, len(errors) // 10))],
        [(h, f"{10.0**h:g}") for h in range(low, int(axes.y[1]) + 1)],
        "What the faster attention changes", "step; shaded: exact attention", "rms of the guided answer",
    )  # fmt: skip
    axes.curve(list(enumerate(heights)), COLOURS[0], dots=4)
    return picture


LEAST_SHARE = 10  # per cent: the axis shows at least so many above and below 0


def draw_learning(explained: Sequence[float], epochs: int) -> Image.Image:
    """explained: a share of the golden noise for each epoch so far, below 0 where the network does harm."""
    picture, draw = sheet()
    values = [100 * max(one, -1.0) for one in explained]
    low = -LEAST_SHARE * math.ceil(max(-min(values), LEAST_SHARE) / LEAST_SHARE)
    high = LEAST_SHARE * math.ceil(max(*values, LEAST_SHARE) / LEAST_SHARE)
    every = LEAST_SHARE * max(1, (high - low) // (10 * LEAST_SHARE))
    axes = Axes(draw, (0, epochs), (low, high))
    axes.frame(
        [(i, str(i)) for i in range(0, epochs + 1, max(1, epochs // 10))],
        [(value, str(value)) for value in range(low, high + 1, every)],
        "What the network explains of unseen prompts", "epoch", "% of the golden noise",
    )  # fmt: skip
    line(draw, [axes.at(0, 0), axes.at(epochs, 0)], INK)
    axes.curve(list(enumerate(values, start=1)), COLOURS[0], dots=4)
    return picture


TALLEST = 6.0  # times as often as stock; what is above is drawn at the top


def draw_density(levels: Levels, stages: Sequence[Tensor], name: str) -> Image.Image:
    """The density over the training time, 1 where it is the stock one; of a curriculum each stage."""
    picture, draw = sheet()
    n = len(levels.sigma)
    top = min(max(2.0, *(1.1 * n * float(shares.max()) for shares in stages)), TALLEST)
    axes = Axes(draw, (0, 1), (0, top))
    shares_of_time = [(t, f"{1 - t:g}\nsigma {_sigma_at(levels, t):.3g}") for t in (0, 0.25, 0.5, 0.75, 1)]
    heights = [(h, f"{h:g}") for h in range(int(top) + 1)]
    axes.frame(shares_of_time, heights, "Draws over the training time", "", "times as often as stock")
    axes.curve([(0, 1), (1, 1)], INK, dashed=True)
    rows = [("stock", INK, True)]
    for i, shares in enumerate(stages):
        colour = COLOURS[i % len(COLOURS)]
        points = [((j + 0.5) / n, n * float(shares[j])) for j in range(n)]
        axes.curve(points, colour)
        rows.append((name if len(stages) == 1 else f"{name}, stage {i + 1} of {len(stages)}", colour, False))
    axes.legend(rows)
    return picture


def _sigma_at(levels: Levels, place: float) -> float:
    return float(levels.sigma[min(int(place * len(levels.sigma)), len(levels.sigma) - 1)])
