"""Whether a fit helps pictures that it has not seen, by more than chance: one test for every kind of fit.

Pictures are the unit, for what happens within one happens together: the blocks of a picture agree with each other, and
counted as samples they let pass a third and more of the fits that gain nothing. The errors of the same pictures before
and after are compared by a one-sided Student's t, and by the exact sign test beside it: where a few pictures get much
worse, six seldom show one of them, and the t alone lets pass 12 to 15 % of the fits without a gain in the mean, both
together 3 to 6 %. Who looks several times at the same pictures says so beforehand: the chance of a false pass is 5 % in
all looks together (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

CHANCE = 0.05  # chance of a false pass in all looks of one run together
LEAST_GAIN = 0.03  # of the mean error; less may be real, but no eye sees it
FEWEST = 6  # pictures; with fewer, Student's t asks for gains that no fit has


@dataclass(frozen=True)
class Verdict:
    """What held-out pictures say about a fit.

    before, after: their mean errors. mean: by which share of `before` the mean error changed (-0.2: a fifth less),
    median: the median of the pictures' own relative changes, share_improved: of the pictures. t: the mean change in its
    standard errors, and needed, below which it counts. share_needed: of pictures that had to get better. least: by
    which share the mean error had to fall besides.
    """

    accepted: bool
    before: float
    after: float
    mean: float
    median: float
    share_improved: float
    t: float
    needed: float
    share_needed: float
    least: float
    pictures: int

    @property
    def said(self) -> str:
        """The figures in words, with what was missing if it did not pass."""
        figures = (
            f"error {self.before:.3g} -> {self.after:.3g} ({self.mean:+.1%}, median {self.median:+.1%}, "
            f"{self.share_improved:.0%} of {self.pictures} pictures better)"
        )
        if self.accepted:
            return figures
        if self.pictures < FEWEST:
            return f"{figures}; at least {FEWEST} pictures are needed to be sure"
        if not self.mean <= -self.least:
            return f"{figures}; {-self.least:.1%} was needed"
        if self.share_improved < self.share_needed:
            return f"{figures}; that may be chance: {self.share_needed:.0%} of the pictures had to get better"
        return f"{figures}; that may be chance: t {self.t:.1f}, needed {self.needed:.1f}"


def judge(
    before: Tensor, after: Tensor, looks: int = 1, doubt: float = 0.0, level: float = CHANCE, least: float = LEAST_GAIN
) -> Verdict:
    """Errors [pictures] of the same held-out pictures: did they fall, surely, by `least` and by more than `doubt`?

    looks: how many such questions one run asks of these pictures. doubt: by how much the errors' own yardstick may be
    wrong for all pictures alike, in their unit. An error is a distance from the yardstick, so only a fall by more than
    twice its own distance from the truth is a fall of the distance from the truth (triangle inequality).
    """
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise ValueError(
            f"A gate needs one error a picture before and after, but got {list(before.shape)} and {list(after.shape)}."
        )
    before, after = before.double(), after.double()
    was, now = float(before.mean()), float(after.mean())
    if not (math.isfinite(was) and math.isfinite(now)):  # a run failed
        was, now = (value if math.isfinite(value) else math.inf for value in (was, now))
        return Verdict(False, was, now, math.nan, math.nan, 0.0, math.nan, math.nan, math.nan, least, len(before))
    asked = max(least, 2 * doubt / was) if was else least
    enough = len(before) >= FEWEST
    needed = -students_t(level / looks, len(before) - 1) if enough else -math.inf
    signs = sign_count(level / looks, len(before))
    change = after - before
    t = in_standard_errors(change)
    mean = now / was - 1 if was else 0.0
    better = int((change < 0).sum())
    return Verdict(
        mean <= -asked and t < needed and better >= signs, was, now, mean,
        float((change / before).nan_to_num(0.0).median()), better / len(before), t, needed, signs / len(before), asked,
        len(before),
    )  # fmt: skip


def in_standard_errors(change: Tensor) -> float:
    """The mean of `change` [pictures] in units of its standard error; without any spread infinite, 0 for no change."""
    mean = float(change.mean())
    error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def sign_count(chance: float, pictures: int) -> int:
    """The least number of pictures that improve with at most this chance where each is as likely to get worse."""
    ways, way = 0, 1  # of exactly `better` pictures, from all down
    for better in range(pictures, -1, -1):
        ways += way
        if ways / 2**pictures > chance:
            return better + 1
        way = way * better // (pictures - better + 1)
    return 0


def students_t(chance: float, freedom: int) -> float:
    """The value that Student's t exceeds with this chance, below a half, by bisection of `students_tail`."""
    low, high = 0.0, 1.0
    while students_tail(high, freedom) > chance:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if students_tail(middle, freedom) > chance else (low, middle)
    return (low + high) / 2


def students_tail(t: float, freedom: int) -> float:
    """The chance that Student's t with `freedom` degrees exceeds t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if freedom < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, but freedom = {freedom}.")
    theta = math.atan(t / math.sqrt(freedom))
    cosine, total = math.cos(theta), 0.0
    term = cosine if freedom % 2 else 1.0
    for k in range(1 + freedom % 2, freedom, 2):  # cos, 2/3 cos^3, ... or 1, 1/2 cos^2, ...
        total += term
        term *= k / (k + 1) * cosine**2
    total *= math.sin(theta)
    within = (theta + total) * 2 / math.pi if freedom % 2 else total
    return (1 - within) / 2
