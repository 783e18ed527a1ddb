"""What a choice of training noise means, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from ...kernels.training_noise import Density, Levels, TimestepDensity

DENSITIES = list(get_args(Density))


def training_report(
    density: TimestepDensity, levels: Levels, stages: Sequence[Tensor], pairing: str, draws: int
) -> str:
    """What is drawn, with the middle half of the draws beside that of stock."""
    stock = " to ".join(f"{sigma:.3g}" for sigma in middle_half(levels, levels.sigma.new_ones(len(levels.sigma))))
    lines = []
    if density.is_stock:
        lines.append(f"Noise levels as stock: half of the draws lie at sigma {stock}.")
    elif len(stages) == 1:
        low, high = middle_half(levels, stages[0])
        lines.append(f"Half of the draws lie at sigma {low:.3g} to {high:.3g}; stock: {stock}.")
    else:
        lowest = [float(levels.sigma[int((shares > 0).nonzero()[-1])]) for shares in stages]
        lines.append(
            f"{len(stages)} stages, down to sigma {', '.join(f'{sigma:.3g}' for sigma in lowest)}; all of them from "
            f"draw {density.planned // 2} on."
        )
    if pairing != "as drawn":
        lines.append(f"Noise: {pairing}{f' ({draws})' if pairing == 'nearest of several' else ''}.")
    return "\n".join(lines)


def middle_half(levels: Levels, shares: Tensor) -> tuple[float, float]:
    """The sigmas between which the middle half of the draws lies."""
    total = shares.double().cumsum(0) / shares.double().sum()
    at = lambda share: float(levels.sigma[min(int((total < share).sum()), len(total) - 1)])
    return at(0.75), at(0.25)
