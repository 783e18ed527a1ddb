"""Schedules that start from a picture: their names, their levels on a model, and what to tell of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.refine import at_ratio, down_from, hir_diff, kept_up_to, ratio, resfusion, resshift, start_for_detail
from ...kernels.space import NoiseSpace
from ...kernels.types import Sigmas
from ...models.calibration import ModelIdentity
from .makers import Sampled

LATENT_SIDE = 64  # for what is told of detail: 512 pixels of SD
HIGHEST_RATIO = 30.0  # of noise to signal, where a flow model's first level has no signal at all
BY_DETAIL = "refine: by detail"
REFINE: dict[str, Callable[[int, NoiseSpace, Tensor], Tensor]] = {
    "refine: Resfusion": lambda steps, space, ends: resfusion(steps, space, float(ends[1])),
    "refine: ResShift": lambda steps, space, ends: resshift(steps),
    "refine: HIR-Diff": lambda steps, space, ends: hir_diff(steps, float(ends[0])),
}
REFINES = (*REFINE, BY_DETAIL)


def refine_schedule(
    name: str, model: ModelIdentity, steps: int, denoise: float, sampled: Sampled, detail: float
) -> tuple[Sigmas, str]:
    """The levels [steps+1] of a start from a picture, the same noise over signal on every model, and what to tell.

    detail: in pixels of the picture, for `BY_DETAIL`.
    """
    if denoise < 1:
        raise ValueError(f"'{name}' itself says how much of the picture is kept: set 'denoise' to 1.")
    space = model.noise_space
    ends = ratio(space, torch.tensor([model.sigma_max, model.sigma_min], dtype=torch.float64)).clamp(max=HIGHEST_RATIO)
    if name == BY_DETAIL:
        side = sampled.side or LATENT_SIDE
        start = min(start_for_detail(detail / sampled.cell, side), float(ends[0]))
        return at_ratio(space, down_from(start, steps, float(ends[1]))), (
            f"by detail: starts from the picture at {start:.3g} parts of noise to one of signal, which draws detail "
            f"finer than {detail:g} pixels anew"
        )
    ratios = REFINE[name](steps, space, ends)
    start = float(ratios[0])
    coarser = f"1/{kept_up_to(start, LATENT_SIDE):.2g}"
    return at_ratio(space, ratios), (
        f"{name.removeprefix('refine: ')}: starts from the picture at {start:.3g} parts of noise to one of signal, "
        f"which keeps detail coarser than {coarser} of the side of a picture with a usual spectrum"
    )
