"""Which steps of a run may use a coarser attention: those whose error does least to the end."""

from __future__ import annotations

from collections.abc import Sequence


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
