"""Which repetitions of a test each run asks, and which `dev.py test --all` alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def daily(values: Iterable, *telling, names: int = 1) -> list:
    """Parameters for `parametrize`: those in `telling` each time, the rest in the night.

    names: how many arguments a value is for, of more than one a tuple. What is in `telling` alone, as the samplers that
    another host may lack, is passed over.
    """
    unpacked = lambda value: (value,) if names == 1 else value
    return [
        value if value in telling else pytest.param(*unpacked(value), marks=pytest.mark.nightly) for value in values
    ]
