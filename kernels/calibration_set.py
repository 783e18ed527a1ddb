"""Which steps of a run a quantiser should see: evenly spread ones, or more of them around one time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist


def uniform_steps(steps: int, count: int) -> list[int]:
    """`count` steps of 0 .. steps - 1, evenly spread (every c-th step, Li et al. 2023, arXiv 2302.04304)."""
    count = min(count, steps)
    return [int((i + 0.5) * steps / count) for i in range(count)]


def normal_steps(times: Sequence[float], count: int, centre: float, spread: float) -> list[int]:
    """`count` steps whose times, 0 without noise to 1, lie as a normal distribution's quantiles, ascending.

    After Shang et al. 2023 (PTQ4DM, arXiv 2211.15736), who draw times from a normal with its mean below the middle:
    here its part in 0..1 is cut into `count` equal shares; the step nearest to each one's middle is taken, none twice.
    """
    bell, free, found = NormalDist(centre, spread), list(range(len(times))), []
    low, high = bell.cdf(0.0), bell.cdf(1.0)
    for i in range(min(count, len(times))):
        time = bell.inv_cdf(low + (i + 0.5) / count * (high - low))
        found.append(min(free, key=lambda step: abs(times[step] - time)))
        free.remove(found[-1])
    return sorted(found)
