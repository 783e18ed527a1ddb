"""From a node's settings to the key steps of a run and to what the other steps reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...kernels.propagation import (
    Costs,
    Reuse,
    fewest_keys,
    published_keys,
    speedup,
    spread_keys,
    transfer_keys,
    uniform_keys,
)
from ...models.calibration import SAME_LEVEL, KeySteps, Point

UNIFORM, TARGET, CALIBRATED, PUBLISHED_KEYS = "uniform", "speed target", "calibrated profile", "published keys"
MODES = [UNIFORM, TARGET, CALIBRATED, PUBLISHED_KEYS]
EVERY_STEP, EVERY_SECOND = "every step", "every second step"
GUIDANCES = [EVERY_STEP, EVERY_SECOND]
AUTOMATIC = "automatic"
TOP_LEVEL, TWO_LEVELS, TWO, ONE = "top level fresh", "two levels fresh", "two blocks fresh", "one block fresh"
ENCODER_REUSED = "encoder reused"
FIRST, ENDS, BEGINNING = "first block fresh", "first and last blocks fresh", "first two thirds reused"
UNET_PARTS = [TOP_LEVEL, TWO_LEVELS, TWO, ONE, ENCODER_REUSED]  # "automatic" takes the first
TRANSFORMER_PARTS = [FIRST, ENDS, BEGINNING]
PARTS = [AUTOMATIC, *UNET_PARTS, *TRANSFORMER_PARTS]
MEASURED_PARTS = [TOP_LEVEL, TWO_LEVELS, TWO, ONE]  # of a UNet by a fit's "automatic", but for those that cost much
NOTHING = "nothing asked"  # of a fit: the steps in between are forecast
FITTED_PARTS = [AUTOMATIC, NOTHING, *UNET_PARTS, *TRANSFORMER_PARTS]
FAR_BELOW = 0.5  # of a whole step: where two levels cost less, most of the work lies below them (SDXL)
PUBLISHED_SHARE = 18 / 28  # the blocks of DiT-XL/2 that the paper takes for its encoder
NEEDS_PROFILE = (
    f"The mode '{CALIBRATED}' needs a profile: connect one from 'Attune Fit Propagation' or 'Attune Load Profile', or "
    f"choose '{UNIFORM}'."
)
FIDELITY = 45.0  # dB to the uncached run, below which differences begin to show


@dataclass(frozen=True)
class ReuseSettings:
    """What the user set on the node."""

    mode: str = UNIFORM
    interval: int = 3
    speed: float = 1.5
    reuse: str = AUTOMATIC
    forecast: bool = True
    keep_last: int = 4
    start_percent: float = 0.0
    end_percent: float = 1.0
    parallel: str = "auto"
    prior_noise: float = 0.0
    cache_dtype: str = "as computed"
    cache_device: str = "as computed"
    memory_limit: int = 0
    guidance: str = EVERY_STEP
    calibration: KeySteps | None = None
    fidelity: float = 0.0  # dB that a calibrated setting must have proved; 0: FIDELITY, or the most faithful one


def reuses_features(settings: ReuseSettings) -> bool:
    """Whether any step of a run can be other than whole."""
    return settings.mode != UNIFORM or settings.interval > 1


def forecasts_answers(settings: ReuseSettings) -> bool:
    """Whether the settings take steps from a profile whose other steps ask nothing."""
    fit = settings.calibration
    return settings.mode in (TARGET, CALIBRATED) and fit is not None and any(point.weights for point in fit.points)


def place_in(fitted: Sequence[float], sigmas: Sequence[float]) -> int | None:
    """From which step of `fitted` on a run over `sigmas` is a part of it; None where its levels are others."""
    near = lambda a, b: abs(a - b) <= SAME_LEVEL * max(a, b)
    for start in range(len(fitted) - len(sigmas) + 1):
        if all(map(near, fitted[start:], sigmas)):
            return start
    return None


@dataclass(frozen=True)
class Choice:
    """The key steps of a run, what the other steps reuse, how many last steps are key steps, and a word on why."""

    keys: frozenset[int]
    reuse: Reuse
    keep_last: int
    said: str


def part_of_unet(name: str) -> str:
    """The part of a UNet that the input 'reuse' stands for; ValueError for one of a transformer."""
    return _part(name, UNET_PARTS, "a UNet", "a transformer")


def part_of_transformer(name: str) -> str:
    """The part of a transformer that the input 'reuse' stands for; ValueError for one of a UNet."""
    return _part(name, TRANSFORMER_PARTS, "a transformer", "a UNet")


def _part(name: str, own: list[str], network: str, other: str) -> str:
    if name not in (AUTOMATIC, *own):
        choices = ", ".join(f"'{one}'" for one in (AUTOMATIC, *own))
        raise ValueError(
            f"'{name}' is a part of {other}, but this MODEL is {network}: set 'reuse' to one of {choices}."
        )
    return own[0] if name == AUTOMATIC else name


def reuse_by_name(name: str, forecast: bool, n: int, levels: Sequence[int]) -> Reuse:
    """A UNet of n blocks a side; `levels`: how many input blocks lie above each of its changes of resolution."""
    top, two = levels[0], levels[:2][-1]
    fresh = {TOP_LEVEL: top, TWO_LEVELS: two, TWO: min(2, top), ONE: 1, ENCODER_REUSED: 0}[name]
    return Reuse(fresh, n - fresh if fresh else 0, forecast).check(n)


def block_reuse_by_name(name: str, forecast: bool, n: int) -> Reuse:
    """A transformer of n blocks: those before `fresh` and from `cut` on are computed, the others are reused."""
    ends = max(1, n // 8)
    fresh, cut = {FIRST: (1, n), ENDS: (ends, n - ends), BEGINNING: (0, round(PUBLISHED_SHARE * n))}[name]
    if not fresh < cut:
        raise ValueError(f"A transformer of {n} blocks has nothing to reuse with '{name}': set 'reuse' to '{FIRST}'.")
    return Reuse(fresh, cut, forecast)


def choose(
    settings: ReuseSettings, sigmas: Sequence[float], times: Sequence[float], costs: Costs, levels: Sequence[int],
    fresh_noise: bool,
) -> Choice:  # fmt: skip
    """What a UNet does over `sigmas` [steps+1], whose training times are `times` [steps] in 0..1."""
    n, steps = len(costs.input), len(sigmas) - 1

    def named(name: str, forecast: bool = settings.forecast) -> Reuse:
        return reuse_by_name(name, forecast, n, levels)

    def two_levels() -> bool:
        """Whether "automatic" computes two levels: no other part is as faithful, where they leave key steps enough."""
        share = costs.of_step(named(TWO_LEVELS))
        if settings.reuse != AUTOMATIC or share > FAR_BELOW:
            return False
        return fewest_keys(steps, settings.speed, share) >= steps // 3 if settings.mode == TARGET else fresh_noise

    part = part_of_unet(settings.reuse)
    parts = [part, ONE] if part != ENCODER_REUSED else [ENCODER_REUSED]
    if two_levels():
        parts = [TWO_LEVELS, *parts]
    choice = _choose(
        settings, sigmas, times, costs, named(ENCODER_REUSED, False), lambda: [named(name) for name in parts]
    )
    if fresh_noise and choice.reuse.fresh == 0:
        said = f"{choice.said}; the solver adds noise, so the top level is computed afresh"
        choice = replace(choice, reuse=named(TOP_LEVEL, choice.reuse.forecast), said=said)
    return choice


def choose_blocks(settings: ReuseSettings, sigmas: Sequence[float], times: Sequence[float], costs: Costs) -> Choice:
    """The same for a transformer; x enters its first block, so fresh noise is seen in any case."""
    n = len(costs.input)
    published = block_reuse_by_name(BEGINNING, False, n)
    named = lambda: [block_reuse_by_name(part_of_transformer(settings.reuse), settings.forecast, n)]
    return _choose(settings, sigmas, times, costs, published, named)


def _choose(
    settings: ReuseSettings, sigmas: Sequence[float], times: Sequence[float], costs: Costs, published: Reuse,
    named: Callable[[], list[Reuse]],
) -> Choice:  # fmt: skip
    """`published` is what the paper reuses; `named()` what the user chose, and what may take its place to be faster."""
    steps = len(sigmas) - 1
    if settings.mode == PUBLISHED_KEYS:
        return Choice(published_keys(times), published, 0, "as published")
    if settings.mode == UNIFORM:
        keys = uniform_keys(steps, settings.interval)
        return Choice(keys, named()[0], settings.keep_last, f"every {settings.interval}")
    if (fit := settings.calibration) is not None:
        point = chosen_point(settings, fit)
        assert point is not None  # where none is faithful enough the MODEL stays as it is
        return Choice(transfer_keys(point.keys, fit.sigmas, sigmas), point.reuse, 0, said_of(point, fit))
    if settings.mode == TARGET:
        return uncalibrated_target(settings, steps, costs, named())
    raise ValueError(NEEDS_PROFILE)


def uncalibrated_target(settings: ReuseSettings, steps: int, costs: Costs, named: list[Reuse]) -> Choice:
    """Evenly spread key steps, as many as the speed allows, with the first part to reuse that can reach it."""
    fewest = settings.keep_last + 1
    for reuse in named:
        share = costs.of_step(reuse)
        keys = fewest_keys(steps, settings.speed, share)
        if speedup(steps, keys, share) >= settings.speed and keys >= fewest:
            said = f"{settings.speed:g}x without a profile, so its fidelity is not known"
            return Choice(spread_keys(steps, keys, settings.keep_last), reuse, 0, said)
    limit = max(speedup(steps, fewest, costs.of_step(reuse)) for reuse in named)
    raise ValueError(
        f"This model cannot run {settings.speed:g} times faster over {steps} steps with 'reuse' at '{settings.reuse}': "
        f"the limit is {limit:.2f}. Lower 'speed' or 'keep_last', or reuse more."
    )


def kinds_of(point: Point) -> str:
    """Which kinds of steps a setting has."""
    if point.weights:
        alone = f", on {len(point.one_sided)} of them for the positive alone" if point.one_sided else ""
        return f"asks the network on {len(point.keys)} steps{alone}"
    fresh, cut = point.reuse.fresh, point.reuse.cut
    first = f"the first {fresh} block{'s' * (fresh > 1)} and " if fresh else ""
    return f"{len(point.keys)} key steps; the other steps compute {first}block {cut} and those behind it"


def said_of(point: Point, fit: KeySteps) -> str:
    """Where a calibrated setting comes from and what it gave."""
    return f"calibrated with {fit.solver} over {len(fit.sigmas) - 1} steps: {point.speed:.2f}x at {point.psnr:.1f} dB"


def chosen_point(settings: ReuseSettings, fit: KeySteps) -> Point | None:
    """The setting of a profile that the mode asks for: the most faithful that reaches the speed, or the fastest that
    proved the fidelity, None where none did. ValueError when none is fast enough."""
    if settings.mode != TARGET:
        return faithful_point(fit, settings.fidelity) if settings.fidelity else calibrated_point(fit)
    enough = [point for point in fit.points if point.speed >= settings.speed]
    if not enough:
        raise ValueError(
            f"The profile's fastest setting is {max(point.speed for point in fit.points):.2f} times faster, but "
            f"'speed' is {settings.speed:g}: lower it, or fit again with a higher 'fastest'."
        )
    return max(enough, key=lambda point: point.psnr)


def faithful_point(fit: KeySteps, fidelity: float) -> Point | None:
    """The fastest setting that proved so many dB, None where none did."""
    faithful = [point for point in fit.points if point.psnr >= fidelity]
    return max(faithful, key=lambda point: point.speed, default=None)


def calibrated_point(fit: KeySteps) -> Point:
    """The fastest setting that stays faithful, or else the most faithful one."""
    return faithful_point(fit, FIDELITY) or max(fit.points, key=lambda point: point.psnr)


def why_whole(settings: ReuseSettings) -> str:
    """Why every step of a calibrated run is whole, in the user's words; "" where it is not."""
    fit = settings.calibration
    if settings.mode != CALIBRATED or fit is None or chosen_point(settings, fit) is not None:
        return ""
    best = max(fit.points, key=lambda point: point.psnr)
    return (
        f"Every step computes the whole network: the most faithful setting of the profile kept {best.psnr:.1f} dB at "
        f"{best.speed:.2f}x, less than the 'fidelity' of {settings.fidelity:g} dB. Lower 'fidelity', or fit a run "
        "of more steps."
    )
