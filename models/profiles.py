"""Profiles: small JSON files that hold a published or a fitted schedule, read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "profiles"
FORMAT = 1
LARGEST_FILE = 1_000_000  # bytes; a schedule needs a few hundred
MOST_LEVELS = 10_001


@dataclass(frozen=True)
class Profile:
    """One schedule and what it was made for.

    name: what the user sees in the list. space: "ve" or "flow". families: class names of the host's model
    configurations, the first is the one it was made on. resolution: (width, height) in pixels. sigmas: the positive
    noise levels of the native run, decreasing; the last one is replaced by 0 when the schedule runs.
    """

    name: str
    method: str
    space: str
    families: tuple[str, ...]
    resolution: tuple[int, int]
    sigmas: tuple[float, ...]
    source: str


def load_profile(path: Path) -> Profile:
    """Read and check one profile file; ValueError names the file, the field and what was expected."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path.name} has {size} bytes; a profile has at most {LARGEST_FILE}. Is it a profile?")
    try:
        fields = json.loads(
            path.read_text("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_repeats
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a profile: {error}. Get the file again, or fit it again.") from error
    return _check(path.name, fields)


@lru_cache(maxsize=1)
def shipped_profiles() -> dict[str, Profile]:
    """The pack's own profiles by name, in the order of their file names."""
    return {profile.name: profile for profile in map(load_profile, sorted(SHIPPED.glob("*.json")))}


def pick_profile(
    profiles: Iterable[Profile], families: Iterable[str], resolution: tuple[int, int] | None = None
) -> Profile | None:
    """The profile for the first of `families` that has one; with a resolution, the nearest in log pixels.

    `families` goes from the model's own configuration class to its base classes.
    """
    profiles = list(profiles)
    for family in families:
        fitting = [profile for profile in profiles if family in profile.families]
        if fitting:
            wanted = resolution or fitting[0].resolution
            return min(fitting, key=lambda profile: abs(math.log(math.prod(profile.resolution) / math.prod(wanted))))
    return None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a profile may hold")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _check(file: str, fields: Any) -> Profile:
    def need(condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{file} is not a format-{FORMAT} schedule profile: {expected}.")

    need(isinstance(fields, dict), "it must be a JSON object")
    version = fields.get("format")
    need(isinstance(version, int) and not isinstance(version, bool), '"format" must be a whole number')
    if version > FORMAT:
        raise ValueError(f"{file} has profile format {version}, newer than this pack knows ({FORMAT}): update Attune.")
    need(version == FORMAT, f'"format" must be {FORMAT}')
    need(fields.get("kind") == "schedule", '"kind" must be "schedule"')
    for key in ("name", "method", "source"):
        need(isinstance(fields.get(key), str) and 0 < len(fields[key]) <= 500, f'"{key}" must be a short text')
    need(fields.get("space") in ("ve", "flow"), '"space" must be "ve" or "flow"')
    families = fields.get("families")
    need(
        isinstance(families, list) and bool(families) and all(isinstance(f, str) for f in families),
        '"families" must list at least one model family',
    )
    resolution = fields.get("resolution")
    need(
        isinstance(resolution, list) and len(resolution) == 2 and all(type(n) is int and n > 0 for n in resolution),
        '"resolution" must be [width, height] in pixels',
    )
    sigmas = fields.get("sigmas")
    need(
        isinstance(sigmas, list)
        and 2 <= len(sigmas) <= MOST_LEVELS
        and all(type(s) in (int, float) and 0 < s < math.inf for s in sigmas)
        and all(a > b for a, b in pairwise(sigmas)),
        '"sigmas" must list at least 2 positive, decreasing noise levels',
    )
    need(fields["space"] == "ve" or sigmas[0] <= 1, "the noise levels of a flow profile are at most 1")
    return Profile(
        fields["name"], fields["method"], fields["space"], tuple(families), tuple(resolution),
        tuple(float(s) for s in sigmas), fields["source"],
    )  # fmt: skip
