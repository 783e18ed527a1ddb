"""The schedules that the makers of models publish, as data: `makers/*.json`, every number with where it was read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .calibration import ModelIdentity, Size

MAKERS = Path(__file__).with_suffix("")
FORMAT = 1
TRAILING, LCM = "trailing", "lcm"
ONCE, TWICE, QUADRATIC, LOGIT_NORMAL = "once", "twice", "quadratic", "logit-normal"
GRIDS = (ONCE, TWICE, QUADRATIC, LOGIT_NORMAL)


@dataclass(frozen=True)
class Constant:
    """One shift at every size. as_mu: whether its maker states the logarithm."""

    value: float
    as_mu: bool


@dataclass(frozen=True)
class Linear:
    """mu on a line over the tokens."""

    tokens: tuple[int, int]
    mu: tuple[float, float]


@dataclass(frozen=True)
class StepsToo:
    """mu linear in the tokens for `few` steps and for `many`, on the line through both for other counts; beyond so many
    tokens that of `many` for every count. Each of the two: (steps, slope, mu at 0 tokens)."""

    few: tuple[int, float, float]
    many: tuple[int, float, float]
    beyond: int


@dataclass(frozen=True)
class BySize:
    """A factor for each of some sizes."""

    sizes: tuple[Size, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Root:
    """The square root of the pixels, over the side of a square; there mu is `mu`."""

    side: int
    mu: float = 0.0


@dataclass(frozen=True)
class Odds:
    """Equal steps of ln((1 - sigma) / sigma) from `low` to `high`, the ends at sigma 1 and 0."""

    low: float
    high: float


@dataclass(frozen=True)
class Karras:
    """Levels of Karras et al. from `high` to `low`."""

    high: float
    low: float
    rho: float


MakersShift: TypeAlias = Constant | Linear | StepsToo | BySize | Root


@dataclass(frozen=True)
class Read:
    """says: which of the numbers; url: where the maker published it; read: the date; through: what it was read in,
    where that is not the maker's page."""

    says: str
    url: str
    read: str
    through: str = ""


@dataclass(frozen=True)
class Published:
    """One schedule as its maker runs it.

    families: class names of the host's model configurations; `only`: what a configuration must say besides. auto:
    whether it is the one for such a model; others are for relatives of the same class, chosen by name. size: the
    maker's own, `frames` latent frames of it; token: pixels a side. levels or timesteps: fixed ones, levels before
    their `shift` if they have one. karras: levels of a model that is not of flow; odds: levels that no shift moves;
    spread: of the logit-normal grid.
    steps: the counts that a distilled model was made for. switch: the level from which the second of two experts runs.
    """

    name: str
    maker: str
    families: tuple[str, ...]
    auto: bool
    sources: tuple[Read, ...]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    size: Size | None = None
    frames: int = 0
    token: int = 0
    shift: MakersShift | None = None
    grid: str = ONCE
    threshold: float = 0.0
    terminal: float | None = None
    levels: tuple[float, ...] = ()
    timesteps: tuple[int, ...] | str = ()
    karras: Karras | None = None
    odds: Odds | None = None
    spread: float = 0.0
    steps: tuple[int, ...] = ()
    switch: float | None = None

    @property
    def space(self) -> Literal["ve", "flow"]:
        return "ve" if self.timesteps or self.karras else "flow"

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of steps that it was made for; () where any will do."""
        fixed = len(self.levels) - 1 if self.levels else 0 if isinstance(self.timesteps, str) else len(self.timesteps)
        return self.steps or ((fixed,) if fixed else ())

    def suits(self, model: ModelIdentity) -> bool:
        """Whether it is for models of this class and configuration.

        A class counts by its own name, not by its bases: what makers publish for one they do not for its children.
        """
        same = self.space == model.space and model.family in self.families
        return same and all(model.network.get(key) in kept for key, kept in self.only.items())


@lru_cache(maxsize=1)
def shipped_makers() -> dict[str, Published]:
    """Every schedule by its name, in the order of the files."""
    found = [one for path in sorted(MAKERS.glob("*.json")) for one in read_makers(path.name, path.read_bytes())]
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def published_for(model: ModelIdentity) -> Published | None:
    """The schedule of a model's own maker, None where none is known; of several the one that asks most of it."""
    fitting = [one for one in shipped_makers().values() if one.auto and one.suits(model)]
    return max(fitting, key=lambda one: len(one.only), default=None)


def read_makers(label: str, content: bytes) -> list[Published]:
    """The schedules of one file; ValueError names the file, the schedule and what was expected."""

    def need(condition: bool, expected: str, name: str = "") -> None:
        if not condition:
            raise ValueError(f"{label}{f', {name}' if name else ''}: {expected}.")

    try:
        fields = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{label} is no JSON: {error}") from error
    need(isinstance(fields, dict) and set(fields) == {"format", "maker", "schedules"}, "format, maker and schedules")
    need(fields["format"] == FORMAT and _is_name(fields["maker"]), f'"format" {FORMAT} and a "maker"')
    return [_published(one, fields["maker"], need) for one in fields["schedules"]]


KNOWN = {*Published.__dataclass_fields__} - {"maker"}


def _published(given: Any, maker: str, need: Any) -> Published:
    need(isinstance(given, dict) and _is_name(given.get("name")), "every schedule needs a name")
    name = given["name"]
    need(set(given) <= KNOWN, f"unknown: {', '.join(sorted(set(given) - KNOWN))}", name)
    need(bool(given.get("families")) and all(map(_is_name, given["families"])), '"families" lists class names', name)
    need(type(given.get("auto")) is bool, '"auto" is true or false', name)
    sources = given.get("sources")
    need(bool(sources) and all(set(one) - {"through"} == {"says", "url", "read"} for one in sources), "sources", name)
    need(all(one["url"].startswith("https://") for one in sources), "a source has an https address", name)
    grid = given.get("grid", ONCE)
    need(grid in GRIDS, f'"grid" is one of {", ".join(GRIDS)}', name)
    known_ways = ("shift", "levels", "timesteps", "karras", "odds")
    ways = [key for key in known_ways if key in given] + [QUADRATIC] * (grid == QUADRATIC)
    one_way = len(ways) == 1 or ways == ["shift", "levels"]
    need(
        one_way,
        "one of shift, levels, timesteps, karras, odds and the quadratic grid, or levels that a shift moves",
        name,
    )
    need((grid == LOGIT_NORMAL) == (given.get("spread", 0) > 0), "the logit-normal grid, and no other, a spread", name)
    shift = _shift(given["shift"], need, name) if "shift" in given else None
    needs_size = isinstance(shift, Linear | StepsToo | BySize | Root)
    need(not needs_size or _is_size(given.get("size")), "a shift by size needs the maker's own size", name)
    need(not isinstance(shift, Linear | StepsToo) or _is_count(given.get("token")), '"token" in pixels', name)
    levels = tuple(map(float, given.get("levels", ())))
    falling = all(a > b for a, b in pairwise(levels))
    need(not levels or (falling and levels[0] <= 1 and levels[-1] == 0), "levels fall from at most 1 to 0", name)
    timesteps = given.get("timesteps", ())
    need(timesteps in (TRAILING, LCM) or all(0 <= one < 1000 for one in timesteps), "timesteps below 1000", name)
    karras = Karras(**given["karras"]) if "karras" in given else None
    need(karras is None or karras.high > karras.low > 0 < karras.rho, "karras falls from high to low", name)
    odds = Odds(**given["odds"]) if "odds" in given else None
    need(odds is None or odds.low < odds.high, "odds rise from low to high", name)
    for key in ("terminal", "switch", "threshold"):
        need(key not in given or 0 < given[key] < 1, f'"{key}" is between 0 and 1', name)
    return Published(
        name, maker, tuple(given["families"]), given["auto"], tuple(Read(**one) for one in sources),
        {key: tuple(kept) for key, kept in given.get("only", {}).items()},
        tuple(given["size"]) if "size" in given else None, given.get("frames", 0), given.get("token", 0), shift, grid,
        given.get("threshold", 0.0), given.get("terminal"), levels,
        timesteps if isinstance(timesteps, str) else tuple(timesteps), karras, odds,
        given.get("spread", 0.0), tuple(given.get("steps", ())), given.get("switch"),
    )  # fmt: skip


def _shift(given: Mapping[str, Any], need: Any, name: str) -> MakersShift:
    match sorted(given):
        case ["factor"]:
            need(given["factor"] > 0, "a factor is positive", name)
            return Constant(float(given["factor"]), False)
        case ["mu"]:
            return Constant(float(given["mu"]), True)
        case ["mu", "tokens"]:
            need(len(given["tokens"]) == len(given["mu"]) == 2, "two points make a line", name)
            return Linear(_pair(given["tokens"]), _pair(given["mu"]))
        case ["beyond", "few", "many"]:
            few, many = (_ends(given[key]) for key in ("few", "many"))
            return StepsToo(few, many, given["beyond"])
        case ["factors", "sizes"]:
            need(len(given["sizes"]) == len(given["factors"]) > 0, "a factor for every size", name)
            return BySize(tuple(_pair(size) for size in given["sizes"]), tuple(map(float, given["factors"])))
        case ["side"] | ["mu", "side"]:
            return Root(given["side"], float(given.get("mu", 0.0)))
    need(False, f"no shift has {', '.join(given)}", name)
    raise AssertionError


def _pair(given: Sequence[Any]) -> tuple[Any, Any]:
    first, second = given
    return first, second


def _ends(given: Mapping[str, Any]) -> tuple[int, float, float]:
    return given["steps"], given["slope"], given["mu"]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))
