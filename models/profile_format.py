"""The JSON object of a calibration, as profile files and workflows hold it, read with suspicion."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any, NoReturn

from ..kernels.fitted_sampler import FittedRun
from ..kernels.forecast import MOST_ANSWERS
from ..kernels.propagation import Reuse
from .calibration import (
    ATTENTION,
    ENCODER,
    FORECAST,
    FORMAT,
    KINDS,
    NOISE_SHIFT,
    PROPAGATION,
    SAMPLER,
    Calibration,
    CondLevels,
    KeySteps,
    Point,
    ShortRun,
    conditioning_map,
)

MOST_LEVELS = 10_001
MOST_ENTRIES, DEEPEST = 2_000, 6  # of the free-form metrics and provenance
MOST_RUNS, MOST_STEPS, MOST_HISTORY, LARGEST_NUMBER = 20, 100, 4, 16.0  # of a fitted sampler
LARGEST_WEIGHT = 1e4  # of a forecast


def parse_profile(label: str, content: bytes) -> Calibration:
    """The calibration of a file's content, in any Unicode that editors write; ValueError names it `label`."""
    try:
        fields = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is not a profile: {error}. Get the file again, or fit it again.") from error
    return read_profile(label, fields)


def spell_profile(calibration: Calibration) -> dict[str, Any]:
    """The JSON object of a calibration, as its file holds it."""
    return {**calibration.fields(), "id": calibration.id}


def read_profile(label: str, fields: Any) -> Calibration:
    """The calibration that parsed JSON stands for; ValueError names it `label`, the field and what was expected."""

    def need(condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{label} is not a format-{FORMAT} profile: {expected}.")

    need(isinstance(fields, dict), "it must be a JSON object")
    version = fields.get("format")
    need(type(version) is int, '"format" must be a whole number')
    if version > FORMAT:
        raise ValueError(f"{label} has profile format {version}, newer than this pack knows ({FORMAT}): update Attune.")
    need(version == FORMAT, f'"format" must be {FORMAT}')
    kind = fields.get("kind")
    need(kind in KINDS, f'"kind" must be one of {", ".join(KINDS)}')
    for key in ("name", "method", "source"):
        need(_is_text(fields.get(key)) and bool(fields[key]), f'"{key}" must be a short text')
    for key in ("solver", "prediction", "config_hash", "weights_hash", "patches", "setting"):
        need(_is_text(fields.get(key, "")), f'"{key}" must be a short text')
    need(fields.get("space") in ("ve", "flow"), '"space" must be "ve" or "flow"')
    families = fields.get("families")
    need(
        isinstance(families, list) and 0 < len(families) <= 100 and all(map(_is_text, families)),
        '"families" must list at least one model family',
    )
    resolution = fields.get("resolution")
    need(_is_resolution(resolution), '"resolution" must be [width, height] in pixels')
    cfg = fields.get("cfg")
    need(cfg is None or _is_level(cfg), '"cfg" must be a number of at least 0')
    sigmas = fields.get("sigmas", [])
    need(
        (_is_schedule(sigmas) and len(sigmas) >= 2) if kind != NOISE_SHIFT else sigmas == [],
        '"sigmas" must list at least 2 decreasing noise levels, all positive or ending in 0'
        if kind != NOISE_SHIFT
        else '"sigmas" has no place in a noise shift',
    )
    need(not sigmas or fields["space"] == "ve" or sigmas[0] <= 1, "the noise levels of a flow profile are at most 1")
    alignments = fields.get("alignments", [])
    need(isinstance(alignments, list) and len(alignments) <= 100, '"alignments" must be a list of at most 100')
    need(kind != NOISE_SHIFT or bool(alignments), '"alignments" must list at least one resolution of a noise shift')
    for key in ("metrics", "provenance"):
        facts = fields.get(key, {})
        need(isinstance(facts, dict) and _size(facts) <= MOST_ENTRIES, f'"{key}" must be a small JSON object')
    profile = Calibration(
        fields["name"], fields["method"], fields["space"], tuple(families), tuple(resolution), _levels(sigmas),
        fields["source"], kind, fields.get("solver", ""), fields.get("prediction", ""),
        None if cfg is None else float(cfg), fields.get("config_hash", ""), fields.get("weights_hash", ""),
        fields.get("patches", ""),
        tuple(_alignment(one, i, need) for i, one in enumerate(alignments)),
        _key_steps(fields, need) if kind in (*PROPAGATION, ATTENTION) else None,
        _runs(fields, need) if kind == SAMPLER else (),
        fields.get("setting", ""),
        fields.get("metrics", {}), fields.get("provenance", {}),
    )  # fmt: skip
    for i, one in enumerate(profile.alignments):
        try:
            conditioning_map(profile, one)
        except ValueError as error:
            raise ValueError(f'{label} is not a format-{FORMAT} profile: "alignments"[{i}]: {error}') from error
    if "id" in fields and fields["id"] != profile.id:
        raise ValueError(
            f"{label} was changed after it was saved: its id no longer fits its content. Fit it again, or remove the "
            'line "id" to use it as it is.'
        )
    return profile


def _alignment(fields: Any, i: int, need: Any) -> CondLevels:
    where = f'"alignments"[{i}]'
    need(isinstance(fields, dict), f"{where} must be a JSON object")
    need(_is_text(fields.get("solver", "")), f'{where} "solver" must be a short text')
    need(_is_resolution(fields.get("resolution")), f'{where} "resolution" must be [width, height] in pixels')
    for key in ("sigma", "sigma_cond"):
        knots = fields.get(key)
        need(
            isinstance(knots, list) and len(knots) <= MOST_LEVELS and all(map(_is_level, knots)),
            f'{where} "{key}" must list noise levels',
        )
    return CondLevels(
        fields.get("solver", ""), tuple(fields["resolution"]), _levels(fields["sigma"]), _levels(fields["sigma_cond"])
    )


def _key_steps(fields: dict[str, Any], need: Any) -> KeySteps:
    """What is reused on which steps, each number inside the network and the schedule it was fitted on."""
    blocks: Any = fields.get("blocks")
    points: Any = fields.get("points")
    steps = len(fields["sigmas"]) - 1
    need(type(blocks) is int and 0 < blocks <= 1000, '"blocks" must be the number of blocks of the network')
    need(isinstance(points, list) and 0 < len(points) <= 100, '"points" must list at least one setting')
    found = []
    for i, one in enumerate(points):
        where = f'"points"[{i}]'
        need(isinstance(one, dict), f"{where} must be a JSON object")
        fresh, cut, keys = one.get("fresh"), one.get("cut"), one.get("keys")
        inside = type(fresh) is int and type(cut) is int and 0 <= fresh <= blocks and 0 <= cut <= blocks
        if fields["kind"] == ENCODER:
            inside = inside and cut < blocks and fresh + cut <= blocks
        else:
            inside = inside and fresh < cut
        need(inside and type(one.get("forecast")) is bool, f"{where} must fit a network of {blocks} blocks")
        need(
            isinstance(keys, list)
            and keys[:1] == [0]
            and all(type(k) is int and 0 <= k < steps for k in keys)
            and all(a < b for a, b in pairwise(keys)),
            f'{where} "keys" must list ascending steps below {steps}, the first of them 0',
        )
        need(_is_level(one.get("speed")) and one["speed"] >= 1, f'{where} "speed" must be at least 1')
        need(_is_level(one.get("psnr")), f'{where} "psnr" must be a number of dB')
        reuse, gave = Reuse(fresh, cut, one["forecast"]), (float(one["speed"]), float(one["psnr"]))
        said = _forecasts(one, keys, steps, where, need) if fields["kind"] == FORECAST else ((), (), ())
        found.append(Point(reuse, tuple(keys), *gave, *said))
    return KeySteps(
        blocks, fields.get("solver", ""), _levels(fields["sigmas"]), tuple(found), fields.get("setting", "")
    )


def _forecasts(one: dict[str, Any], keys: list[int], steps: int, where: str, need: Any) -> tuple:
    """one_sided, weights and errors of a setting whose other steps ask nothing."""
    alone: Any = one.get("one_sided", [])
    rows: Any = one.get("weights")
    errors: Any = one.get("errors")
    need(
        isinstance(alone, list)
        and all(type(k) is int for k in alone)
        and set(alone) <= set(keys[1:])
        and all(a < b for a, b in pairwise(alone)),
        f'{where} "one_sided" must list ascending steps of "keys" behind the first',
    )
    need(
        isinstance(rows, list)
        and len(rows) == steps
        and all(_is_forecast(row, sum(k < i for k in keys)) for i, row in enumerate(rows))
        and all(rows[i] for i in range(steps) if i not in keys),
        f'{where} "weights" must hold a row for each step, of at most {MOST_ANSWERS + 1} numbers up to '
        f"{LARGEST_WEIGHT:g}",
    )
    need(
        isinstance(errors, list) and len(errors) == steps and all(map(_is_level, errors)),
        f'{where} "errors" must hold a number for each step',
    )
    return tuple(alone), tuple(map(_levels, rows)), _levels(errors)


def _is_forecast(row: Any, asked: int) -> bool:
    """Whether a row is empty, or has a number for the state and for each of the last answers, of `asked` before it, or
    of fewer where the fitted run's prompts had changed."""
    if not isinstance(row, list) or len(row) not in (0, *range(2, min(asked, MOST_ANSWERS) + 2)):
        return False
    return all(type(n) in (int, float) and abs(n) <= LARGEST_WEIGHT for n in row)


def _runs(fields: dict[str, Any], need: Any) -> tuple[ShortRun, ...]:
    """Short runs between the ends of the long one, with numbers that no fit exceeds."""
    runs: Any = fields.get("runs")
    need(isinstance(runs, list) and 0 < len(runs) <= MOST_RUNS, f'"runs" must list 1 to {MOST_RUNS} fitted runs')
    found = []
    for i, one in enumerate(runs):
        where = f'"runs"[{i}]'
        need(isinstance(one, dict), f"{where} must be a JSON object")
        levels, rows, pictures = one.get("sigmas"), one.get("numbers"), one.get("pictures", 0)
        shares = one.get("shares", [])
        need(
            _is_schedule(levels) and 2 <= len(levels) <= MOST_STEPS + 1 and _same_ends(levels, fields["sigmas"]),
            f'{where} "sigmas" must go from the first noise level of the profile down to its last',
        )
        need(
            isinstance(rows, list) and len(rows) == len(levels) - 1 and all(map(_is_row, rows, range(len(rows)))),
            f'{where} "numbers" must hold a row for each step: 2 numbers and one for each answer before it, at most '
            f"{MOST_HISTORY}, none beyond {LARGEST_NUMBER:g}",
        )
        need(
            isinstance(shares, list) and len(shares) in (0, len(rows)) and all(map(_is_level, shares)),
            f'{where} "shares" must hold a number for each step',
        )
        need(_is_level(one.get("psnr")), f'{where} "psnr" must be a number of dB')
        need(type(pictures) is int and 0 <= pictures <= 1_000_000, f'{where} "pictures" must be a whole number')
        run = FittedRun(_levels(levels), tuple(map(_levels, rows)), _levels(shares))
        found.append(ShortRun(run, float(one["psnr"]), pictures))
    return tuple(found)


def _same_ends(levels: list[float], long: list[float]) -> bool:
    return all(abs(a - b) <= 1e-5 * max(a, b) for a, b in ((levels[0], long[0]), (levels[-1], long[-1])))


def _is_row(row: Any, step: int) -> bool:
    return (
        isinstance(row, list)
        and 2 <= len(row) <= 2 + min(step, MOST_HISTORY)
        and all(type(n) in (int, float) and abs(n) <= LARGEST_NUMBER for n in row)
    )


def _levels(numbers: list[float]) -> tuple[float, ...]:
    return tuple(float(number) for number in numbers)


def _is_text(value: Any) -> bool:
    """A short text that can be written back: JSON can spell halves of characters."""
    return isinstance(value, str) and len(value) <= 500 and not re.search("[\ud800-\udfff]", value)


def _is_resolution(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n <= 1_000_000 for n in value)


def _is_level(value: Any) -> bool:
    """A number from 0 that a float can hold; a JSON whole number can be any size."""
    return type(value) in (int, float) and 0 <= value <= 1e30


def _is_schedule(sigmas: Any) -> bool:
    return (
        isinstance(sigmas, list)
        and len(sigmas) <= MOST_LEVELS
        and all(map(_is_level, sigmas))
        and all(float(a) > float(b) for a, b in pairwise(sigmas))
    )


def _size(value: Any, depth: int = 0) -> float:
    """How many values a piece of free-form JSON holds; infinite for what cannot be written back."""
    if depth > DEEPEST:
        return math.inf
    if isinstance(value, dict):
        keys = all(map(_is_text, value))
        return 1 + sum(_size(one, depth + 1) for one in value.values()) if keys else math.inf
    if isinstance(value, list):
        return 1 + sum(_size(one, depth + 1) for one in value)
    if isinstance(value, str):
        return 1 if _is_text(value) else math.inf
    if type(value) in (int, float):
        return 1 if abs(value) <= 1e300 else math.inf
    return 1 if value is None or isinstance(value, bool) else math.inf


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a profile may hold")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields
