"""Which of some drafts is picked: by its number, or by scores from any node."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BEHIND = r"[\s,;]+"


@dataclass(frozen=True)
class Drafts:
    """The seeds that were drafted, in the order of the sheet."""

    seeds: tuple[int, ...]


def picked(drafts: Drafts, number: int, scores: Any = None) -> int | None:
    """The index of the picked draft; None where neither a number nor scores say which.

    number: from 1, as on the sheet; 0 leaves it to `scores`, of which the highest wins. ValueError, in the names on
    screen, for a number that no draft has and for scores that are not one finite number for each draft.
    """
    count = len(drafts.seeds)
    if number > count:
        raise ValueError(f"'number' is {number}, but there are {count} drafts: choose one of 1 to {count}.")
    if number > 0:
        return number - 1
    if scores is None:
        return None
    values = list(_numbers(scores))
    if len(values) != count or not all(map(math.isfinite, values)):
        came = f"{len(values)} finite" if all(map(math.isfinite, values)) else "some that are not finite"
        raise ValueError(
            f"'scores' must hold one finite number for each of the {count} drafts, but it holds {came}: score every "
            "picture of 'drafts', one by one with the stock node Rebatch Images."
        )
    return max(range(count), key=lambda i: values[i])


def _numbers(value: Any) -> Iterable[float]:
    """The numbers in what a scoring node gives: numbers, texts of them, tensors, and lists of these."""
    if isinstance(value, Tensor):
        yield from value.detach().flatten().tolist()
    elif isinstance(value, bool | int | float):
        yield float(value)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, str):
        yield from map(_number, filter(None, re.split(BEHIND, value.strip())))
    elif hasattr(value, "__float__"):  # numpy's numbers
        yield float(value)
    else:
        raise ValueError(
            f"'scores' must be numbers, one for each draft, but it holds a {type(value).__name__}: connect a node that "
            "scores pictures."
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"'scores' must be numbers, one for each draft, but it holds the text '{text[:40]}': connect a node that "
            "scores pictures."
        ) from None
