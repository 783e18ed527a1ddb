"""Forecasts: on most steps nothing is asked, and what the guided model would say follows from what it has said.

Of one recorded run the inner products of its states x_j and answers D_j are enough to know, for every step, how well
the answers of any two earlier steps and the new state forecast its own: which steps to ask follows for every budget at
once, without another call of the network (`forecast_errors`, `optimal_kinds`). Cost tensors of this kind are DPCache's
(arXiv 2602.22654) for features, and those of `propagation.optimal_keys` for one network. The numbers of each forecast
are then fitted on the states of the short run itself, towards the recorded path, so that each step mends what those
before it did wrong. Steps count from 0, the noisiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .fitted_sampler import solve_normal
from .one_sided import FIRST_WHOLE, line_weight
from .space import NoiseSpace
from .types import Latent

MOST_ANSWERS = 3  # answers that a forecast is made of; a fourth gains nothing on fresh pictures
LEAST_SQUARES_RIDGE = 1e-5  # of the squared length of each feature
OPEN_RIDGE = 1e-3  # the same, for forecasts that are only compared
PULL = 0.6  # towards the recorded state: 1 would undo a state's whole error in one Euler step; .3 to 1 are alike
AT_A_TIME = 1 << 20  # elements of each tensor that are multiplied at a time
FURTHEST_MOVE = 2  # of one asked step, while plans are searched
BOTH_SIDES, ONE_SIDE = 2, 1  # what a step costs, in answers of the network


# --- which steps to ask ---


def mean_products(tensors: Sequence[Tensor]) -> Tensor:
    """[n, n] in float64 on the CPU: the mean products of n tensors of one shape, element by element."""
    flat = [one.reshape(-1) for one in tensors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].numel(), AT_A_TIME):
        part = (
            torch.stack([one[start : start + AT_A_TIME] for one in flat]).cpu().double()
        )  # not every device has these
        total += part @ part.T
    return total / flat[0].numel()


def forecast_errors(products: Tensor, gaps: int, ages: int) -> Tensor:
    """[gaps+1, ages, n]: the rms error of forecasting the answer of step j from those at k = j - a and k - g.

    products: [2n, 2n], of the n states and then the n answers. D_j - D_k is fitted with x_j - x_k and D_k - D_{k-g};
    g = 0: there is no second answer. Infinite where a step would lie before the first.
    """
    n = len(products) // 2
    errors = torch.full((gaps + 1, ages, n), torch.inf, dtype=torch.float64)
    for age in range(1, min(ages, n - 1) + 1):
        for gap in range(min(gaps, n - 1 - age) + 1):
            step = torch.arange(age + gap, n)
            key = step - age
            target, moved, changed = (n + step, n + key), (step, key), (n + key, n + key - gap)
            rows = [moved, changed] if gap else [moved]
            dot = lambda a, b: _differences(products, a, b)
            left = torch.stack([torch.stack([dot(a, b) for b in rows], -1) for a in rows], -2)
            left = left + torch.diag_embed(OPEN_RIDGE * left.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30))
            right = torch.stack([dot(a, target) for a in rows], -1)
            gained = (torch.linalg.solve(left, right[..., None])[..., 0] * right).sum(-1)
            errors[gap, age - 1, step] = (dot(target, target) - gained).clamp(min=0).sqrt()
    return errors


def _differences(products: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """<v_a0 - v_a1, v_b0 - v_b1> for index pairs."""
    return products[a[0], b[0]] - products[a[0], b[1]] - products[a[1], b[0]] + products[a[1], b[1]]


def one_sided_errors(products: Tensor, sigmas: Sequence[float], cfg: float, space: NoiseSpace, shape: Tensor) -> Tensor:
    """[gaps+1, ages, n] like `shape`: the rms error of the guided answer on a one-sided step (kernels' `one_sided`).

    products: [n, n], of the differences of both answers in units of the noise. An error of e is one of (cfg - 1) sigma
    e in what is guided.
    """
    errors, n = torch.full_like(shape, torch.inf), len(products)
    for gap in range(shape.shape[0]):
        for age in range(1, shape.shape[1] + 1):
            for step in range(age + gap, n):
                last, before = step - age, step - age - gap
                on = line_weight(space, sigmas[step], sigmas[last], sigmas[before]) if gap else 0.0
                at, e = [step, last, before], torch.tensor([1.0, -1 - on, on], dtype=torch.float64)
                square = float(e @ products[at][:, at] @ e)
                errors[gap, age - 1, step] = abs(cfg - 1) * sigmas[step] * math.sqrt(max(square, 0.0))
    return errors


@dataclass(frozen=True)
class Kinds:
    """Which steps are asked, and which of these are one-sided; error: the weighted sum that was expected."""

    keys: tuple[int, ...]
    one_sided: tuple[int, ...]
    error: float

    @property
    def asked(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What tells two plans apart."""
        return self.keys, self.one_sided

    def cost(self) -> float:
        """In whole evaluations."""
        return len(self.keys) - len(self.one_sided) / 2


def optimal_kinds(
    forecasts: Tensor, sided: Tensor | None, weights: Sequence[float], always: Collection[int] = ()
) -> dict[int, Kinds]:  # fmt: skip
    """For every number of answers (two a whole step, one a one-sided one) the steps with the least weighted error.

    forecasts, sided: [gaps+1, ages, n], of `forecast_errors` and `one_sided_errors`; None where nothing is one-sided. A
    one-sided step stands between whole ones, and is none of `always` and of the first FIRST_WHOLE. Dynamic programming
    over (last asked step, its distance to the one before, whether it was one-sided), for all numbers at once.
    """
    gaps, ages, n = forecasts.shape
    scale = torch.tensor(weights, dtype=torch.float64)
    skipped, halved = forecasts * scale, None if sided is None else sided * scale
    most, must = BOTH_SIDES * n, {0, *always}
    nothing = torch.full((most + 1,), torch.inf, dtype=torch.float64)
    first = nothing.clone()
    first[BOTH_SIDES] = 0.0
    table: dict[tuple[int, int, bool], Tensor] = {(0, 0, False): first}
    came: dict[tuple[int, int, bool], Tensor] = {}
    ends: dict[tuple[int, int, bool], Tensor] = {}
    states: dict[tuple[int, int, bool], int] = {}

    def offer(to: tuple[int, int, bool], cost: int, total: Tensor, origin: int) -> None:
        moved = torch.cat([nothing[:cost], total[: most + 1 - cost]])
        best, source = table.setdefault(to, nothing.clone()), came.setdefault(to, torch.full((most + 1,), -1))
        better = moved < best
        best[better], source[better] = moved[better], origin

    for i in range(n):
        for state in [(i, gap, one) for gap in range(gaps) for one in (False, True) if (i, gap, one) in table]:
            origin, total = states.setdefault(state, len(states)), table[state]
            _, gap, one = state
            for nxt in range(i + 1, n + 1):
                age = nxt - 1 - i
                if age:  # step nxt - 1 is forecast from i
                    if age > ages or nxt - 1 in must:
                        break
                    total = total + skipped[gap, age - 1, nxt - 1]
                if nxt == n:
                    ends[state] = total
                    break
                reach = min(nxt - i, gaps - 1)
                offer((nxt, reach, False), BOTH_SIDES, total, origin)
                alone = halved is not None and not one and nxt not in must and nxt >= FIRST_WHOLE and nxt - i <= ages
                if alone:
                    assert halved is not None
                    offer((nxt, reach, True), ONE_SIDE, total + halved[gap, nxt - i - 1, nxt], origin)
    return _read([*states], came, ends, most)


def expected_error(kinds: Kinds, forecasts: Tensor, sided: Tensor | None, weights: Sequence[float]) -> float:
    """The sum that `optimal_kinds` minimises, of these steps; infinite where a distance lies outside of the tables."""
    gaps, ages, n = forecasts.shape
    total, gap, last = 0.0, 0, 0
    for i in range(1, n):
        asked = i in kinds.keys
        if not asked or i in kinds.one_sided:
            table = sided if asked else forecasts
            if table is None or i - last > ages or gap >= gaps:
                return math.inf
            total += float(table[gap, i - last - 1, i]) * weights[i]
        if asked:
            gap, last = min(i - last, gaps - 1), i
    return total


def neighbours(kinds: Kinds, steps: int, always: Collection[int] = ()) -> list[Kinds]:
    """The plans of equal cost with one asked step up to FURTHEST_MOVE later or earlier; error: not known.

    As in `optimal_kinds` the first step and those of `always` stay, and a one-sided step stands between whole ones.
    """
    found, must = [], {0, *always}
    for key in kinds.keys:
        for move in (m for m in range(-FURTHEST_MOVE, FURTHEST_MOVE + 1) if m and key not in must):
            to = key + move
            if not 0 < to < steps or to in kinds.keys:
                continue
            moved = lambda many, key=key, to=to: tuple(sorted(to if i == key else i for i in many))
            keys, alone = moved(kinds.keys), moved(kinds.one_sided)
            halves = [i in alone for i in keys]
            if not any(a and b for a, b in pairwise(halves)) and all(i >= FIRST_WHOLE and i not in must for i in alone):
                found.append(Kinds(keys, alone, math.inf))
    return found


def climb(
    start: Kinds, nearby: Callable[[Kinds], Sequence[Kinds]], expected: Callable[[Kinds], float], tries: int
) -> Generator[Kinds, float, Kinds]:
    """Hill climbing by real runs: yields plans to be tried, is sent how faithful each was, and returns the best.

    start is tried first. Of the plans around the best one the most promising by `expected` is next, each once.
    BudCache (arXiv 2606.13496) searches its key steps in this way, from random ones.
    """
    best, score, seen = start, (yield start), {start.asked}
    for _ in range(tries):
        around = [one for one in nearby(best) if one.asked not in seen]
        if not around:
            break
        tried = min(around, key=expected)
        seen.add(tried.asked)
        if (faithful := (yield tried)) > score:
            best, score = tried, faithful
    return best


def _read(states: list, came: dict, ends: dict, most: int) -> dict[int, Kinds]:
    found = {}
    for count in range(BOTH_SIDES, most + 1):
        state, total = min(((s, float(t[count])) for s, t in ends.items()), key=lambda one: one[1])
        if math.isinf(total):
            continue
        keys, alone, left = [], [], count
        while True:
            i, _, one = state
            keys.append(i)
            if one:
                alone.append(i)
            if i == 0:
                break
            origin = states[int(came[state][left])]
            left -= ONE_SIDE if one else BOTH_SIDES
            state = origin
        found[count] = Kinds(tuple(reversed(keys)), tuple(reversed(alone)), total)
    return found


# --- what they say ---


@dataclass(frozen=True)
class Asked:
    """A step that was asked: its state and its answer, [b ...]."""

    x: Latent
    answer: Latent


def parts(x: Latent, past: Sequence[Asked]) -> list[Tensor]:
    """What the forecast at state x is a sum of, beside the last answer: the state's way, the answers' changes, the last
    answer. past: what was asked, the last MOST_ANSWERS of it count."""
    last, *before = reversed(past[-MOST_ANSWERS:])
    return [x - last.x, *(last.answer - one.answer for one in before), last.answer]


def forecast(weights: Sequence[float], x: Latent, past: Sequence[Asked]) -> Latent:
    """The answer at state x."""
    answer = past[-1].answer.clone()
    for weight, feature in zip(weights, parts(x, past), strict=True):
        answer = answer.add_(feature, alpha=weight)
    return answer


def aim(x: Latent, recorded: Asked, sigma: float, sigma_next: float) -> Latent:
    """The answer that a forecast is fitted to: the recorded run's, with a pull of the state back towards that run's.

    An Euler step x' = r x + (1 - r) D, r = sigma_next / sigma, would reach the recorded x' with PULL = 1.
    """
    ratio = sigma_next / sigma
    return recorded.answer + PULL * ratio / (1 - ratio) * (recorded.x - x)


def fit_weights(target: Latent, x: Latent, past: Sequence[Asked]) -> tuple[float, ...]:
    """Least squares in float64 with LEAST_SQUARES_RIDGE, by inner products alone."""
    *rows, wanted = [*parts(x, past), target - past[-1].answer]
    return tuple(solve_normal(mean_products([*rows, wanted]), LEAST_SQUARES_RIDGE).tolist())


def missed(said: Latent, answer: Latent, last: Latent) -> Tensor:
    """The error of a forecast in units of what happened since the last answer, on its device."""
    return (said - answer).float().norm() / (answer - last).float().norm()
