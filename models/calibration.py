"""Profiles: small JSON files that hold a published or a fitted calibration, read with suspicion."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..kernels.conditioning import ConditioningMap
from ..kernels.propagation import Reuse
from ..kernels.space import NoiseSpace
from .store import written_whole

SHIPPED = Path(__file__).parent / "profiles"
FORMAT = 1
KINDS = ("schedule", "noise_shift", "encoder_propagation", "block_propagation")
PROPAGATION = KINDS[2:]
LARGEST_FILE = 1_000_000  # bytes; a schedule needs a few hundred
MOST_LEVELS = 10_001
MOST_ENTRIES, DEEPEST = 2_000, 6  # of the free-form metrics and provenance
SUFFIX = ".json"
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # on Windows


@dataclass(frozen=True)
class ModelIdentity:
    """What a schedule must know of a model.

    families: its configuration class and that class's bases, by name, nearest first. space: "ve" or "flow". sigma_min
    and sigma_max: the model's own noise levels, in that space's units. prediction: what the network predicts, "eps",
    "v", "edm", "flow". config_hash: names its architecture. weights_hash: names its weights, without LoRAs. All ""
    where unknown. shift: of a flow model's own schedulers, None where it has none. patched: whether weights are changed
    by LoRAs or their like.
    """

    families: tuple[str, ...]
    space: Literal["ve", "flow"]
    sigma_min: float
    sigma_max: float
    prediction: str = ""
    config_hash: str = ""
    shift: float | None = None
    weights_hash: str = ""
    patched: bool = False


@dataclass(frozen=True)
class Point:
    """One calibrated setting: its key steps, what the other steps reuse, and what it gave."""

    reuse: Reuse
    keys: tuple[int, ...]
    speed: float
    psnr: float  # dB of the final latents to the uncached run's


@dataclass(frozen=True)
class KeySteps:
    """What was measured on one model, solver and schedule: `points` from the most faithful to the fastest."""

    blocks: int
    solver: str
    sigmas: tuple[float, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class CondLevels:
    """What the network is told in place of the true noise level, knot by knot.

    solver: the sampler it was fitted with, "" for every sampler. resolution: (width, height) it holds for. sigma:
    ascending levels inside the model's range; sigma_hat: the level told there.
    """

    solver: str
    resolution: tuple[int, int]
    sigma: tuple[float, ...]
    sigma_hat: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """One calibration and what it was made for.

    kind: "schedule" or "noise_shift". name: what the user sees. space: "ve" or "flow". families: class names of the
    host's model configurations, the first is the one it was made on. resolution: (width, height) in pixels. sigmas:
    decreasing noise levels of the native run. A published table has only positive ones and the last is replaced by 0
    when it runs; a fitted schedule ends in its own 0; a noise shift has none. source: where it comes from.

    Of a fit also, "" or None where unknown: solver, prediction ("eps", "v", "edm", "flow"), cfg, config_hash (of the
    network's configuration, never of a path or a file name), weights_hash (of a sample of its weights), alignments, one
    per resolution; calibration, what encoder or block propagation reuses on which of the `sigmas`. metrics and
    provenance are free-form facts; prompts only as `text_hash`.
    """

    name: str
    method: str
    space: Literal["ve", "flow"]
    families: tuple[str, ...]
    resolution: tuple[int, int]
    sigmas: tuple[float, ...]
    source: str
    kind: str = "schedule"
    solver: str = ""
    prediction: str = ""
    cfg: float | None = None
    config_hash: str = ""
    weights_hash: str = ""
    alignments: tuple[CondLevels, ...] = ()
    calibration: KeySteps | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the native run."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def is_fitted(self) -> bool:
        """Whether the levels are run as they are, 0 included, and not as a published table."""
        return bool(self.sigmas) and self.sigmas[-1] == 0

    @property
    def id(self) -> str:
        """Names the calibration itself: the same whatever it is called, however it was measured, by whom and when."""
        said = _fields(self)
        what = {key: said[key] for key in said if key not in ("id", "name", "source", "metrics", "provenance")}
        return f"attune-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}"

    def describe(self) -> str:
        """What the profile is, was made for and was measured to do, a few lines."""
        size = "x".join(map(str, self.resolution))
        run = f"{self.steps} steps" if self.sigmas else f"{len(self.alignments)} picture sizes"
        made = ", ".join(filter(None, [self.solver, f"cfg {self.cfg:g}" if self.cfg is not None else "", size]))
        facts = [f"{key}: {json.dumps(value)}" for key, value in (*self.metrics.items(), *self.provenance.items())]
        return "\n".join(
            [f"{self.name} ({self.method}, {run})", f"for {self.families[0]}, {made}", self.source, *facts]
        )

    def with_facts(self, metrics: Mapping[str, Any] | None = None, **provenance: Any) -> Calibration:
        """The same calibration with more `metrics` and more provenance."""
        return replace(self, metrics={**self.metrics, **(metrics or {})}, provenance={**self.provenance, **provenance})


def text_hash(text: str) -> str:
    """How a prompt is recorded: enough to recognise it, nothing to read."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_profile(path: Path) -> Calibration:
    """Read and check one profile file; ValueError names the file, the field and what was expected."""
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path.name} has more than the {LARGEST_FILE} bytes of a profile at most. Is it a profile?")
    try:
        fields = json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_repeats
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a profile: {error}. Get the file again, or fit it again.") from error
    return read_profile(path.name, fields)


def read_profile(label: str, fields: Any) -> Calibration:
    """The profile that parsed JSON stands for; ValueError names it `label`, with the field and what was expected."""
    return _check(label, fields)


def spell_profile(profile: Calibration) -> dict[str, Any]:
    """The JSON object of a profile, as its file holds it."""
    return {**_fields(profile), "id": profile.id}


def save_profile(profile: Calibration, folder: Path, name: str = "", replace: bool = False) -> Path:
    """Write `profile` into `folder` under a safe form of `name` (default: its own) and return the path.

    The file appears whole or not at all. Unless `replace`, a file of that name that holds another calibration, or is no
    profile, stays as it is: the new one gets a number. ValueError, before anything is written, for a profile that could
    not be read back.
    """
    stem = file_stem(name or profile.name)
    try:
        text = json.dumps(spell_profile(profile), indent=1, allow_nan=False)
        _check(stem + SUFFIX, json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"The profile '{profile.name}' cannot be saved: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    path = _free_path(folder, stem, profile.id, replace)
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
    return path


def file_stem(name: str) -> str:
    """A file name for `name` on every system, without the suffix: no folders, no hidden or reserved names."""
    if name.lower().endswith(SUFFIX):
        name = name[: -len(SUFFIX)]
    stem = re.sub(r"[^\w .,()+=-]+", "_", name).strip(" .")
    stem = stem.encode()[:100].decode(errors="ignore").strip(" .")  # bytes are what file systems count
    if not re.search(r"\w", stem.replace("_", "")):
        raise ValueError(f"'{name[:100]}' is no file name: give the profile a name with letters or digits.")
    return f"_{stem}" if stem.split(".")[0].lower() in RESERVED else stem


def conditioning_map(profile: Calibration, alignment: CondLevels, strength: float = 1.0) -> ConditioningMap:
    """The function of sigma that an alignment of `profile` stands for."""
    return ConditioningMap.through(NoiseSpace(profile.space), alignment.sigma, alignment.sigma_hat, strength)


@lru_cache(maxsize=1)
def shipped_profiles() -> dict[str, Calibration]:
    """The pack's own profiles by name, in the order of their file names."""
    return {profile.name: profile for profile in map(load_profile, sorted(SHIPPED.glob("*.json")))}


def pick_profile(
    profiles: Iterable[Calibration], families: Iterable[str], resolution: tuple[int, int] | None = None
) -> Calibration | None:
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


def _free_path(folder: Path, stem: str, wanted_id: str, replace: bool) -> Path:
    """The first of "stem.json", "stem (2).json", … that may be written: not taken, or of the same calibration."""
    number = 1
    while True:
        path = folder / (f"{stem}{SUFFIX}" if number == 1 else f"{stem} ({number}){SUFFIX}")
        if path.resolve().parent != folder.resolve():
            raise ValueError(f"'{path.name}' leads out of the profile folder. Choose another name.")
        if replace or not path.exists() or _id_of(path) == wanted_id:
            return path
        number += 1


def _id_of(path: Path) -> str:
    try:
        return load_profile(path).id
    except (ValueError, OSError):
        return ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a profile may hold")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _fields(profile: Calibration) -> dict[str, Any]:
    """The JSON object of a profile; what a published table does not have is left out."""
    fitted = profile.calibration
    fields = {
        "format": FORMAT,
        "kind": profile.kind,
        "name": profile.name,
        "method": profile.method,
        "space": profile.space,
        "families": list(profile.families),
        "resolution": list(profile.resolution),
        "sigmas": list(profile.sigmas),
        "source": profile.source,
        "solver": profile.solver,
        "prediction": profile.prediction,
        "cfg": profile.cfg,
        "config_hash": profile.config_hash,
        "weights_hash": profile.weights_hash,
        "alignments": [
            {
                "solver": one.solver,
                "resolution": list(one.resolution),
                "sigma": list(one.sigma),
                "sigma_hat": list(one.sigma_hat),
            }
            for one in profile.alignments
        ],
        "blocks": fitted.blocks if fitted else None,
        "points": [
            {
                "fresh": point.reuse.fresh,
                "cut": point.reuse.cut,
                "forecast": point.reuse.forecast,
                "keys": list(point.keys),
                "speed": point.speed,
                "psnr": point.psnr,
            }
            for point in (fitted.points if fitted else ())
        ],
        "metrics": dict(profile.metrics),
        "provenance": dict(profile.provenance),
    }
    return {key: value for key, value in fields.items() if value not in ("", None, [], {})}


def _check(file: str, fields: Any) -> Calibration:
    def need(condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{file} is not a format-{FORMAT} profile: {expected}.")

    need(isinstance(fields, dict), "it must be a JSON object")
    version = fields.get("format")
    need(type(version) is int, '"format" must be a whole number')
    if version > FORMAT:
        raise ValueError(f"{file} has profile format {version}, newer than this pack knows ({FORMAT}): update Attune.")
    need(version == FORMAT, f'"format" must be {FORMAT}')
    kind = fields.get("kind")
    need(kind in KINDS, f'"kind" must be one of {", ".join(KINDS)}')
    for key in ("name", "method", "source"):
        need(_is_text(fields.get(key)) and bool(fields[key]), f'"{key}" must be a short text')
    for key in ("solver", "prediction", "config_hash", "weights_hash"):
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
        (_is_schedule(sigmas) and len(sigmas) >= 2) if kind != "noise_shift" else sigmas == [],
        '"sigmas" must list at least 2 decreasing noise levels, all positive or ending in 0'
        if kind != "noise_shift"
        else '"sigmas" has no place in a noise shift',
    )
    need(not sigmas or fields["space"] == "ve" or sigmas[0] <= 1, "the noise levels of a flow profile are at most 1")
    alignments = fields.get("alignments", [])
    need(isinstance(alignments, list) and len(alignments) <= 100, '"alignments" must be a list of at most 100')
    need(kind != "noise_shift" or bool(alignments), '"alignments" must list at least one resolution of a noise shift')
    for key in ("metrics", "provenance"):
        facts = fields.get(key, {})
        need(isinstance(facts, dict) and _size(facts) <= MOST_ENTRIES, f'"{key}" must be a small JSON object')
    profile = Calibration(
        fields["name"], fields["method"], fields["space"], tuple(families), tuple(resolution), _levels(sigmas),
        fields["source"], kind, fields.get("solver", ""), fields.get("prediction", ""),
        None if cfg is None else float(cfg), fields.get("config_hash", ""), fields.get("weights_hash", ""),
        tuple(_alignment(one, i, need) for i, one in enumerate(alignments)),
        _calibration(fields, need) if kind in PROPAGATION else None,
        fields.get("metrics", {}), fields.get("provenance", {}),
    )  # fmt: skip
    for i, one in enumerate(profile.alignments):
        try:
            conditioning_map(profile, one)
        except ValueError as error:
            raise ValueError(f'{file} is not a format-{FORMAT} profile: "alignments"[{i}]: {error}') from error
    if "id" in fields and fields["id"] != profile.id:
        raise ValueError(
            f"{file} was changed after it was saved: its id no longer fits its content. Fit it again, or remove the "
            'line "id" to use it as it is.'
        )
    return profile


def _alignment(fields: Any, i: int, need: Any) -> CondLevels:
    where = f'"alignments"[{i}]'
    need(isinstance(fields, dict), f"{where} must be a JSON object")
    need(_is_text(fields.get("solver", "")), f'{where} "solver" must be a short text')
    need(_is_resolution(fields.get("resolution")), f'{where} "resolution" must be [width, height] in pixels')
    for key in ("sigma", "sigma_hat"):
        knots = fields.get(key)
        need(
            isinstance(knots, list) and len(knots) <= MOST_LEVELS and all(map(_is_level, knots)),
            f'{where} "{key}" must list noise levels',
        )
    return CondLevels(
        fields.get("solver", ""), tuple(fields["resolution"]), _levels(fields["sigma"]), _levels(fields["sigma_hat"])
    )


def _calibration(fields: dict[str, Any], need: Any) -> KeySteps:
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
        if fields["kind"] == "encoder_propagation":
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
        reuse = Reuse(fresh, cut, one["forecast"])
        found.append(Point(reuse, tuple(keys), float(one["speed"]), float(one["psnr"])))
    return KeySteps(blocks, fields.get("solver", ""), _levels(fields["sigmas"]), tuple(found))


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
