"""What a node says of the time that a fit still takes."""

from __future__ import annotations

import pytest

from pack.nodes._plan.time_left import TimeLeft, duration


def test_the_rest_takes_as_long_as_what_was_done():
    said, clock = [], [0.0]
    left = TimeLeft(said.append, 100, 3.0, lambda: clock[0])
    for done, now in ((0, 0.0), (1, 0.1), (10, 20.0), (11, 20.2), (60, 90.0), (100, 150.0)):
        clock[0] = now
        left.update(done, "long runs")
    assert said == [
        "long runs: 0 of at most 100 evaluations, about 5 min left",
        "long runs: 10 of at most 100 evaluations, about 3 min left",
        "long runs: 60 of at most 100 evaluations, about 60 s left",
        "long runs: 100 of at most 100 evaluations",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (45.4, "45 s"),
        (89, "89 s"),
        (100, "2 min"),
        (3560, "59 min"),
        (3590, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_as_one_says_them(seconds, said):
    assert duration(seconds) == said
