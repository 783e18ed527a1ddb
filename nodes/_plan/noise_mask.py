"""How much noise each pixel of a picture gets, from what the user gave."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.noise_mask import edges, of_holes, uncertainty, with_floor

EDGES, TWO_PICTURES, WARPED = "edges", "two pictures", "warped picture"
SOURCES = (EDGES, TWO_PICTURES, WARPED)


def strengths(
    source: str, image: Tensor, other: Tensor | None, holes: Tensor | None, floor: float, feather: int
) -> Tensor:
    """Shares of the first noise level [b h w], for IMAGE [b h w c]; ValueError in the names on screen."""
    if source == EDGES:
        return with_floor(edges(image), floor)
    if source == TWO_PICTURES:
        if other is None:
            raise ValueError(
                "'two pictures' compares 'image' with 'other': connect the second one, such as another upscale."
            )
        if other.shape[1:] != image.shape[1:] or len(other) not in (1, len(image)):
            raise ValueError(
                f"'image' is {list(image.shape)} and 'other' {list(other.shape)}: scale both to the same size first."
            )
        return with_floor(uncertainty(image, other), floor)
    if holes is None:
        raise ValueError("'warped picture' needs 'holes', a mask that is white where nothing was seen.")
    size = image.shape[1:3]
    wide = torch.nn.functional.interpolate(holes.float()[:, None], size, mode="nearest")[:, 0].clamp(0, 1)
    return of_holes(wide.expand(len(image), -1, -1) if len(wide) == 1 else wide, floor, feather)
