"""What the network is told: a noise level for its conditioning that may differ from the noise in the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .space import NoiseSpace
from .types import Sigma

LARGEST_RATIO = 8.0  # of sigma_cond to sigma, on flow of their odds; a fit that asks for more is not credible
FADE = 1.0  # log units beyond the outermost knots until the map is the identity


@dataclass(frozen=True)
class ConditioningMap:
    """sigma -> sigma_cond, piecewise linear in l = ln(sigma / alpha): l_hat = l + offset(l), never decreasing.

    `at` are the values of l in ascending order, `offset` the offsets there; the first and the last offset are 0 and so
    is every offset beyond. Where the offset is 0, sigma comes back unchanged to the last bit: at 0, at a flow's 1 and
    everywhere on the identity. Solvers evaluate between the levels of a schedule too, hence a function of sigma and
    not of the step. Make one with `through` or `compose`.
    """

    space: NoiseSpace
    at: tuple[float, ...]
    offset: tuple[float, ...]
    _on_device: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def through(
        cls, space: NoiseSpace, sigma: Sequence[float], sigma_cond: Sequence[float], strength: float = 1.0
    ) -> ConditioningMap:
        """The map through the knots (sigma, sigma_cond), its offsets times `strength` (0 is the identity, 1 all).

        `sigma` ascends, inside (0, inf) on VE and (0, 1) on flow: the ends of the range map to themselves and are no
        knots. Beyond its knots the offset falls linearly to 0 within one log unit, or within twice its own size if
        that is more, lest the map turn back. Knots out of order are lifted to the running maximum. ValueError for
        knots that are no calibration: not finite, out of range, or a ratio beyond 8.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"The strength of a conditioning map goes from 0 to 1, but it is {strength:.4g}.")
        low, high = _log_ratios(space, "sigma", sigma), _log_ratios(space, "sigma_cond", sigma_cond)
        if len(low) != len(high) or not low:
            raise ValueError(
                f"A conditioning map needs as many sigma_cond as sigma, but there are {len(high)} and {len(low)}."
            )
        for i, (a, b) in enumerate(pairwise(low)):
            if a >= b:
                raise ValueError(
                    f"The knots of a conditioning map must ascend, but sigma[{i}] = {sigma[i]:.4g} is followed by "
                    f"{sigma[i + 1]:.4g}."
                )
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            if abs(b - a) > math.log(LARGEST_RATIO) * (1 + 1e-12):
                raise ValueError(
                    f"The conditioning map turns sigma {sigma[i]:.4g} into {sigma_cond[i]:.4g}, a ratio beyond "
                    f"{LARGEST_RATIO:.0f}: this calibration is not credible. Fit it again."
                )
        raised = list(accumulate(high, max))
        first, last = raised[0] - low[0], raised[-1] - low[-1]
        at = (low[0] - max(FADE, 2 * abs(first)), *low, low[-1] + max(FADE, 2 * abs(last)))
        offsets = (strength * (b - a) for a, b in zip(low, raised, strict=True))
        return cls(space, at, (0.0, *offsets, 0.0))

    @property
    def is_identity(self) -> bool:
        return not any(self.offset)

    def offset_at(self, log_ratio: float) -> float:
        """The offset at one value of ln(sigma / alpha)."""
        at = torch.tensor(log_ratio, dtype=torch.float64)
        return float(self._offset(at))

    def __call__(self, sigma: Sigma) -> Sigma:
        """sigma_cond for every element of `sigma`; same shape, dtype and device."""
        if self.is_identity:
            return sigma
        # Half precision would round the logarithm; float64 is unknown to some devices.
        level = sigma if sigma.dtype == torch.float64 else sigma.float()
        log_ratio = self.space.log_ratio(level)
        offset = self._offset(log_ratio)
        return torch.where(offset == 0, level, self.space.at_log_ratio(log_ratio + offset)).to(sigma.dtype)

    def _offset(self, log_ratio: Tensor) -> Tensor:
        at, offset = self._knots(log_ratio)
        inside = log_ratio.clamp(at[0], at[-1])
        high = torch.searchsorted(at, inside.contiguous(), right=True).clamp(max=len(at) - 1)
        share = (inside - at[high - 1]) / (at[high] - at[high - 1])
        return torch.lerp(offset[high - 1], offset[high], share)

    def _knots(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`at` and `offset` where the noise levels are: copied once, not at every step."""
        key = (like.dtype, like.device)
        if key not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[key] = (
                    torch.tensor(self.at, dtype=like.dtype, device=like.device),
                    torch.tensor(self.offset, dtype=like.dtype, device=like.device),
                )
        return self._on_device[key]


def compose(maps: Sequence[ConditioningMap]) -> ConditioningMap:
    """All `maps` at once: their offsets at the true sigma add up, in any order to the same bit.

    So an alignment and a shift for the resolution, each fitted on its own, correct the same level once each. Where the
    sum would turn back it is lifted to its running maximum.
    """
    spaces = {one.space for one in maps}
    if len(spaces) != 1:
        raise ValueError(f"Conditioning maps compose in one noise space, but there are {len(spaces)}.")
    changing = [one for one in maps if not one.is_identity] or list(maps[:1])
    if len(changing) == 1:
        return changing[0]
    at = sorted({knot for one in changing for knot in one.at})
    offsets = [math.fsum(one.offset_at(knot) for one in changing) for knot in at]
    levels = [knot + offset for knot, offset in zip(at, offsets, strict=True)]
    for i, highest in enumerate(accumulate(levels, max)):
        lifted = min(highest, at[-1])  # the last knot maps to itself
        if lifted != levels[i]:
            offsets[i] = lifted - at[i]
    return ConditioningMap(spaces.pop(), tuple(at), tuple(offsets))


def _log_ratios(space: NoiseSpace, name: str, levels: Sequence[float]) -> list[float]:
    top = math.inf if space.kind == "ve" else 1.0
    for i, level in enumerate(levels):
        if not 0 < level < top:
            raise ValueError(
                f"The knots of a conditioning map lie between 0 and {top:g}, ends excluded, but {name}[{i}] = "
                f"{level:.4g}."
            )
    return space.log_ratio(torch.tensor(list(levels), dtype=torch.float64)).tolist()
