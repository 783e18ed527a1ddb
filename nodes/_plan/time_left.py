"""How much longer a fit takes, as its node says it."""

from __future__ import annotations

import time
from collections.abc import Callable

OFTEN = 0.5  # seconds from one text to the next


class TimeLeft:
    """Says what is being done and how long the rest takes, from the evaluations of the model so far.

    most: evaluations in all, at most. seconds: that one takes, as far as is known before the first. now: a clock.
    """

    def __init__(
        self, say: Callable[[str], None], most: int, seconds: float = 0.0, now: Callable[[], float] = time.monotonic
    ):
        self._say, self._most, self._seconds, self._now = say, most, seconds, now
        self._began, self._last = now(), float("-inf")

    def update(self, done: int, stage: str) -> None:
        """`done` evaluations are made; says so unless it has just said something."""
        now = self._now()
        if now - self._last < OFTEN:
            return
        self._last = now
        each = (now - self._began) / done if done else self._seconds
        left = max(self._most - done, 0) * each
        said = f", about {duration(left)} left" if left else ""
        self._say(f"{stage}: {done} of at most {self._most} evaluations{said}")


def duration(seconds: float) -> str:
    """As one says it: 40 s, 3 min, 1 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
