"""Propagation: on which steps a network runs whole, what the other steps reuse, and the cache it is kept in.

Faster Diffusion (Li et al. 2023, arXiv 2312.09608) runs a UNet's encoder on *key* steps only and lets the decoders of
the steps in between work on its last features. DeepCache (Ma et al. 2023, arXiv 2312.00858) keeps one deep feature
instead and computes the outermost blocks afresh. Both are members of one family (`Reuse`). Steps count from 0, the
noisiest.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .space import NoiseSpace
from .types import Latent

# Shares of the training time below which the paper's Stable Diffusion runs have their key steps: appendix F.2, key
# steps 0, 1, 2, 3, 5, 10, 15, 25, 35 of 50 DDIM steps.
PUBLISHED_TIMES = (1.0, 0.98, 0.96, 0.94, 0.90, 0.80, 0.70, 0.50, 0.30)
PRIOR_NOISE_TIME = 0.5  # the prior noise is injected in the second half of the training time (section 3.3)
FURTHEST_FORECAST = 1.5  # in units of the last distance between two key steps
NOISY_REACH = 0.6  # of the way that a forecast goes where a solver adds noise, which does not go on
ONE_TIMESTEP = 1e-3  # of the training time: hosts round the timestep of a noise level to a whole number
SAME = 1e-5  # relative difference up to which two noise levels are one: samplers compute theirs in float32


@dataclass(frozen=True)
class Reuse:
    """What a step that is not a key step computes in a UNet of n input blocks, a middle and n output blocks.

    The first `fresh` input blocks run on the new x, and decoding starts at output block `cut`; everything in between
    comes from the last key step, or with `forecast` from the line through the last two. (0, 0) is encoder propagation
    as published, (k + 1, n - k - 1) is DeepCache with branch k.
    """

    fresh: int
    cut: int
    forecast: bool = False

    def check(self, n: int) -> Reuse:
        """Return itself; ValueError unless it fits a UNet of n blocks a side."""
        if not (self.fresh >= 0 and 0 <= self.cut < n and self.fresh + self.cut <= n):
            raise ValueError(
                f"A UNet of {n} input and {n} output blocks can reuse with 0 <= cut < {n} and fresh + cut <= {n}, "
                f"but fresh = {self.fresh} and cut = {self.cut}."
            )
        return self

    def kept_skips(self, n: int) -> range:
        """The input blocks whose skip features are cached."""
        return range(self.fresh, n - self.cut)


@dataclass(frozen=True)
class Costs:
    """What each block of a UNet costs, in shares of one whole evaluation (they sum to 1).

    always: what every step computes beside them.
    """

    input: tuple[float, ...]
    middle: float
    output: tuple[float, ...]
    always: float = 0.0

    def of_step(self, reuse: Reuse) -> float:
        """The share that a step with `reuse` costs."""
        return self.always + sum(self.input[: reuse.fresh]) + sum(self.output[reuse.cut :])


def speedup(steps: int, keys: int, share: float) -> float:
    """How many times less computing a run needs when its steps other than key steps cost `share` of a whole one."""
    return steps / (keys + (steps - keys) * share)


def fewest_keys(steps: int, speed: float, share: float) -> int:
    """The largest number of key steps with which a run is still `speed` times faster, at least 1."""
    if share >= 1:
        return steps
    return max(1, min(steps, math.floor(steps * (1 / speed - share) / (1 - share) + 1e-9)))


# --- key steps ---


def uniform_keys(steps: int, interval: int) -> frozenset[int]:
    """Every `interval`-th step, from the first."""
    if interval < 1:
        raise ValueError(f"Key steps need an interval of at least 1, but it is {interval}.")
    return frozenset(range(0, steps, interval))


def spread_keys(steps: int, keys: int, last: int) -> frozenset[int]:
    """`keys` key steps as evenly as they go, the last `last` steps of the run among them."""
    last = min(last, keys - 1)
    free = steps - last
    return frozenset(round(i * free / (keys - last)) for i in range(keys - last)) | set(range(free, steps))


def published_keys(times: Sequence[float]) -> frozenset[int]:
    """The paper's key steps on any schedule: the first step at or below each published training time.

    times: 0..1 per step, decreasing, each right to one timestep. On the uniform 50 steps that the paper used these are
    its own indices; its literal indices mean other noise levels on other schedules.
    """
    found = (next((i for i, t in enumerate(times) if t <= bound + ONE_TIMESTEP), None) for bound in PUBLISHED_TIMES)
    return frozenset({0, *(i for i in found if i is not None)})


def boundary_keys(sigmas: Sequence[float], boundaries: Iterable[float]) -> frozenset[int]:
    """The first step at or below, and the first below, each noise level at which the conditioning changes."""
    steps = sigmas[:-1]
    found = set()
    for bound in boundaries:
        found |= {next((i for i, s in enumerate(steps) if s <= bound), 0)}
        found |= {next((i for i, s in enumerate(steps) if s < bound), 0)}
    return frozenset(found)


def transfer_keys(keys: Iterable[int], fitted: Sequence[float], sigmas: Sequence[float]) -> frozenset[int]:
    """Key steps found on the schedule `fitted`, for the schedule `sigmas`: as dense around every noise level.

    Both list n+1 decreasing levels. Key steps are counted along the fitted schedule (linear between them), the count is
    scaled with the number of steps, so that a run of another length saves the same share, and a step that reaches the
    next whole number is a key step. The fitted schedule gets its own keys back.
    """
    marks = [*sorted(keys), len(fitted) - 1]
    scale = (len(sigmas) - 1) / (len(fitted) - 1)
    new: set[int] = set()
    for i, sigma in enumerate(sigmas[:-1]):
        at = _position(fitted, sigma)
        n = max(bisect_right(marks, at + 1e-3) - 1, 0)
        counted = n + (at - marks[n]) / (marks[n + 1] - marks[n]) if n + 1 < len(marks) else n
        if scale * counted + 1e-2 >= len(new):
            new.add(i)
    return frozenset(new)


def _position(levels: Sequence[float], sigma: float) -> float:
    """The fractional index of `sigma` in decreasing `levels`, linear in log sigma, in the last step to 0 in sigma."""
    if sigma >= levels[0]:
        return 0.0
    for i, (high, low) in enumerate(pairwise(levels)):
        if sigma >= low:
            return i + (math.log(high / sigma) / math.log(high / low) if low > 0 else 1 - sigma / high)
    return float(len(levels) - 1)


# --- calibrated key steps ---


def step_weights(sigmas: Sequence[float], space: NoiseSpace) -> list[float]:
    """What an error of the denoised latent at each step does to the final one: exact for a unit Gaussian.

    An Euler step turns it into (1 - sigma_next / sigma) of itself in x at sigma_next, and from there the flow to
    sigma = 0 shrinks differences like the spread of x, sqrt(alpha^2 + (scale sigma)^2), to that of a latent of unit
    variance.
    """
    s = torch.tensor(list(sigmas), dtype=torch.float64)
    spread = (space.alpha(s[1:]) ** 2 + (space.scale * s[1:]) ** 2).sqrt()
    return ((1 - s[1:] / s[:-1]) / spread).tolist()


def optimal_keys(
    errors: Tensor, weights: Sequence[float], always: Iterable[int] = ()
) -> dict[int, tuple[float, frozenset[int]]]:
    """For every number of key steps, those with the least weighted sum of errors: {count: (sum, keys)}.

    errors: [gaps+1, ages, steps]; [g, a-1, j] is the error of step j when the last key step is j - a and the one
    before it g steps earlier, g = 0: there is none. Infinite where it was not measured, so no key step lies further
    back. `always` are key steps in any case. Dynamic programming over (last key step, its distance to the one before).
    """
    gaps, ages, steps = errors.shape
    weighted = (errors.double() * torch.tensor(weights, dtype=torch.float64)).tolist()
    always = {0, *always}
    best: dict[tuple[int, int], dict[int, tuple[float, tuple[int, ...]]]] = {(0, 0): {1: (0.0, (0,))}}
    done: dict[int, tuple[float, frozenset[int]]] = {}
    for i in range(steps):
        for gap in range(gaps):
            for count, (total, keys) in best.pop((i, gap), {}).items():
                for nxt in range(i + 1, steps + 1):
                    if nxt - 1 > i:  # step nxt - 1 joins the group of i
                        age = nxt - 1 - i
                        if age > ages or nxt - 1 in always:
                            break
                        total += weighted[gap][age - 1][nxt - 1]
                    if math.isinf(total):
                        break
                    if nxt == steps:
                        _keep(done, count, total, frozenset(keys))
                    else:
                        state = best.setdefault((nxt, min(nxt - i, gaps - 1)), {})
                        _keep(state, count + 1, total, (*keys, nxt))
    return dict(sorted(done.items()))


def _keep(table: dict, count: int, total: float, keys: Iterable[int]) -> None:
    if count not in table or total < table[count][0]:
        table[count] = (total, keys)


# --- the plan of one run ---


@dataclass(frozen=True)
class ReusePlan:
    """What happens on each step of a run: sigmas [n+1], times [n] (the network's timesteps), the key steps."""

    sigmas: tuple[float, ...]
    times: tuple[float, ...]
    keys: frozenset[int]
    forecast: bool = False

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step(self, sigma: float) -> int:
        """The step that an evaluation at `sigma` belongs to: the last one whose noise level is not below it."""
        return max((i for i, s in enumerate(self.sigmas[:-1]) if s >= sigma * (1 - SAME)), default=0)

    def on_grid(self, step: int, sigma: float) -> bool:
        """Whether `sigma` is the very noise level of the step, rather than one between two steps."""
        return math.isclose(sigma, self.sigmas[step], rel_tol=SAME)

    def time(self, sigma: float) -> float:
        """The network's timestep at any noise level, linear in sigma between the steps."""
        i = self.step(sigma)
        if i + 1 >= self.steps or sigma >= self.sigmas[i]:
            return self.times[i]
        high, low = self.sigmas[i], self.sigmas[i + 1]
        return self.times[i] + (self.times[i + 1] - self.times[i]) * (high - sigma) / (high - low)

    def last_key(self, step: int) -> int:
        return max(k for k in self.keys if k <= step)

    @cached_property
    def captured(self) -> frozenset[int]:
        """The key steps whose features a later step uses, as the last or (forecast) as the one before."""
        keys, used = sorted(self.keys), set()
        for n, k in enumerate(keys):
            if k + 1 < self.steps and k + 1 not in self.keys:
                used |= set(keys[max(n - self.forecast, 0) : n + 1])
        return frozenset(used)

    def group(self, step: int) -> range:
        """From a step that is not a key step to the last one before the next key step."""
        end = next((i for i in range(step, self.steps) if i in self.keys), self.steps)
        return range(step, end)


def make_plan(
    sigmas: Sequence[float], times: Sequence[float], keys: Iterable[int], *, forecast: bool,
    always: Iterable[int] = (), last: int = 0, active: tuple[float, float] = (math.inf, 0.0),
) -> ReusePlan:  # fmt: skip
    """A plan from chosen key steps, with the steps that must be key steps in any case.

    always: where the conditioning changes. last: how many steps at the end of a run that ends at 0 are key steps; their
    errors are the ones that no later step repairs. active: noise levels (from, to) outside of which all steps are.
    """
    steps = len(sigmas) - 1
    chosen = {0, *keys, *always} & set(range(steps))
    if sigmas[-1] == 0:
        chosen |= set(range(max(steps - last, 0), steps))
    chosen |= {i for i in range(steps) if not active[1] <= sigmas[i] <= active[0]}
    return ReusePlan(tuple(map(float, sigmas)), tuple(map(float, times)), frozenset(chosen), forecast)


def forecast_weight(time: float, last: float, before: float) -> float:
    """How far to go on along the line from the features at `before` to those at `last`, to be at `time`.

    0 holds the last features. Limited to FURTHEST_FORECAST, since a line through two near points errs far away.
    """
    if last == before:
        return 0.0
    return min(max((time - last) / (last - before), 0.0), FURTHEST_FORECAST)


# --- prior noise ---


def add_prior_noise_(x: Latent, noise: Latent, sigma: float, strength: float, space: NoiseSpace) -> Latent:
    """z_t <- z_t + strength * z_T (section 3.3), in place: a little of the run's first noise restores fine detail.

    The paper writes it for variance-preserving latents, z = x / sqrt(1 + sigma^2); a flow model's x needs the scale of
    its noise alone.
    """
    scale = math.sqrt(1 + sigma * sigma) if space.kind == "ve" else space.scale
    return x.add_(noise, alpha=strength * scale)


# --- features of earlier steps ---

Features = dict[Hashable, Tensor]  # block -> [rows ...]


@dataclass(frozen=True, eq=False)
class Capture:
    """The features of one call of the network: `chunks` conditions of equally many rows each, in the order of the call.

    signature: whatever must be equal for the features to fit another call (shapes, dtype, device).
    """

    step: int
    time: float
    signature: Hashable
    chunks: int
    features: Features


class FeatureCache:
    """The last `depth` captures of every condition, and outputs that were computed ahead.

    A key names a condition: (its id, the context window, how often it occurred in the evaluation). `dtype` and `device`
    are how features are kept; None leaves them as they come. `reach`: how far along their line forecasts go.
    """

    def __init__(
        self, depth: int, dtype: torch.dtype | None = None, device: torch.device | None = None, reach: float = 1.0
    ):
        self.depth, self.dtype, self.device, self.reach = depth, dtype, device, reach
        self._captures: dict[Hashable, deque[tuple[Capture, int]]] = {}
        self._ahead: dict[Hashable, dict[Hashable, Tensor]] = {}

    def store(self, keys: Sequence[Hashable], step: int, time: float, signature: Hashable, features: Features) -> None:
        """Keep the features of a call whose batch holds the conditions `keys`; a second capture of a step replaces."""
        kept = {name: value.to(dtype=self.dtype, device=self.device) for name, value in features.items()}
        capture = Capture(step, time, signature, len(keys), kept)
        for i, key in enumerate(keys):
            history = self._captures.setdefault(key, deque(maxlen=self.depth))
            if history and history[-1][0].step == step:
                history.pop()
            history.append((capture, i))
            self._ahead.pop(key, None)

    def holds(self, key: Hashable, since: int) -> bool:
        """Whether the condition was captured at step `since` or later."""
        return any(capture.step >= since for capture, _ in self._captures.get(key, ()))

    def recall(
        self, keys: Sequence[Hashable], signature: Hashable, since: int, time: float, like: Tensor,
        sources: tuple[int, int | None] | None = None,
    ) -> Features | None:  # fmt: skip
        """The features of a call at `time`, from captures at step `since` or later; None where one of them is missing.

        With two captures of a condition they are extrapolated along the line through both, else held. `sources` names
        the steps of the last capture and of the one before it, for a calibration that compares several.
        """
        pairs = [self._pair(key, signature, since, sources) for key in keys]
        if None in pairs:
            return None
        last, before = ([pair[i] for pair in pairs] for i in (0, 1))
        features = _join(last, like)
        if features is None or None in before:
            return features
        weight = self.reach * forecast_weight(time, last[0][0].time, before[0][0].time)
        old = _join(before, like) if weight > 0 else None
        if old is None or old.keys() != features.keys():
            return features
        return {name: torch.lerp(old[name], value, 1 + weight) for name, value in features.items()}

    def _pair(self, key, signature, since, sources):
        history = self._captures.get(key, ())
        if sources is not None:
            found = {capture.step: (capture, i) for capture, i in history if capture.signature == signature}
            last, before = found.get(sources[0]), found.get(sources[1])
            missing = last is None or (before is None and sources[1] is not None)
            return None if missing else (last, before)
        if not history or history[-1][0].step < since or any(c.signature != signature for c, _ in history):
            return None  # where something changed, a forecast waits for its second capture
        return history[-1], history[-2] if len(history) > 1 else None

    def keep_ahead(self, keys: Sequence[Hashable], step: int, signature: Hashable, output: Tensor) -> None:
        """Keep the network's output at a coming step for a call of `keys`."""
        for key, part in zip(keys, output.chunk(len(keys)), strict=True):
            self._ahead.setdefault(key, {})[step, signature] = part

    def ahead(self, keys: Sequence[Hashable], step: int, signature: Hashable) -> Tensor | None:
        """The output that was computed ahead for this step, for all of `keys` or not at all."""
        parts = [self._ahead.get(key, {}).get((step, signature)) for key in keys]
        if any(part is None for part in parts):
            return None
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()  # type: ignore[arg-type, union-attr]

    @property
    def bytes(self) -> int:
        """What the kept features take."""
        captures = {id(c): c for history in self._captures.values() for c, _ in history}
        return sum(v.numel() * v.element_size() for c in captures.values() for v in c.features.values())

    def clear(self) -> None:
        self._captures.clear()
        self._ahead.clear()


def _join(parts: list[tuple[Capture, int]], like: Tensor) -> Features | None:
    """The chunks as one batch: without a copy where they are a whole capture; None where they do not fit together."""
    first = parts[0][0]
    if len(parts) == first.chunks and all(c is first and i == at for at, (c, i) in enumerate(parts)):
        joined = first.features
    else:
        chunks = [{name: value.chunk(c.chunks)[i] for name, value in c.features.items()} for c, i in parts]
        if any(chunk.keys() != chunks[0].keys() for chunk in chunks):
            return None
        joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: value.to(like) for name, value in joined.items()}


# --- tiles ---

SAME_PLACE = 0.25  # of the correlation of fine detail: one place has .4 and more from step to step, another one 0


def fine_detail(x: Latent) -> Tensor:
    """Differences of neighbours along both sides: nearly white in a latent, so it tells one place from the next."""
    for side in (-1, -2):
        if x.shape[side] > 1:
            x = x.diff(dim=side)
    return x


def resemblance(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of two tensors of one shape around 0, as a tensor on their device."""
    a, b = a.float(), b.float()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-30)
