"""Which steps of a run may use a coarser attention: those whose error does least to the end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NINE_IN_TEN = {2: 3.769, 3: 2.178, 4: 1.831}  # t(n - 1, 0.9) sqrt(1 + 1/n), for n prompts


def best_windows(costs: Sequence[float]) -> list[tuple[float, int]]:
    """For every number n of consecutive steps from 1 on, the (sum, first step) of those with the least sum of `costs`.

    costs: of each step, its error times what that does to the end (`step_weights`). The first step of a run, which
    decides most, is in none.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    steps = len(costs)
    return [min((total[i + n] - total[i], i) for i in range(1, steps - n + 1)) for n in range(1, steps)]


def kept_by_others(each: Sequence[float]) -> float:
    """What nine in ten other prompts keep, in dB, by what each of these keeps: the lower 90 % prediction bound of a
    normal distribution (Hahn and Meeker 1991), mean - t(n - 1, 0.9) sqrt(1 + 1/n) s. One prompt says nothing about
    others, and gives its own."""
    if len(each) == 1:
        return each[0]
    return statistics.fmean(each) - NINE_IN_TEN[len(each)] * statistics.stdev(each)
