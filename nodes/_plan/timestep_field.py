"""Which noise level each frame of a film has in each step, from what the user chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.timestep_field import Timetable, given_shares, staircase, stretched, together

FIRST_GIVEN, BOTH_GIVEN, EXTEND, STAIRCASE, FREE = (
    "first frame given", "first and last given", "extend", "staircase", "free",
)  # fmt: skip
PRESETS = (FIRST_GIVEN, BOTH_GIVEN, EXTEND, STAIRCASE, FREE)
EVEN = 1e-3  # a mask that differs by less within a frame is one number


@dataclass(frozen=True)
class FieldWish:
    """As on the node; frames are the latent's. shown: the noise level at which finished frames are shown."""

    preset: str = FIRST_GIVEN
    given: int = 1
    shown: float = 0.0
    levels: str = ""
    window: int = 0
    block: int = 1
    overlap: int = 0
    mask: Tensor | None = None

    @property
    def takes_frames(self) -> bool:
        """Whether frames of the latent are given."""
        return self.preset in (FIRST_GIVEN, BOTH_GIVEN) or (self.preset in (EXTEND, STAIRCASE) and self.given > 0)

    def timetable(self, sigmas: Tensor, size: tuple[int, int, int], by_token: bool) -> Timetable:
        """Of a film of `size`, frames, height and width; ValueError in the names on screen.

        by_token: whether the network can have levels that differ within a frame.
        """
        frames = size[0]
        if self.preset == STAIRCASE:
            window = min(self.window or frames, frames)
            overlap = self.overlap or window // 2
            return staircase(sigmas, frames, self.given, window, self.block, min(overlap, window - 1))
        return together(sigmas, self._shares(size, by_token))

    def _shares(self, size: tuple[int, int, int], by_token: bool) -> Tensor:
        if self.preset == FIRST_GIVEN:
            return given_shares(size[0], 1)
        if self.preset == BOTH_GIVEN:
            return given_shares(size[0], 1, 1)
        if self.preset == EXTEND:
            if self.given < 1:
                raise ValueError("'extend' goes on from given frames: set 'given_frames' to 1 or more.")
            return given_shares(size[0], self.given)
        if self.mask is not None:
            return _of_mask(self.mask, size, by_token)
        if not self.levels.strip():
            raise ValueError("'free' takes the frames' levels from 'levels', such as 0, 0.5, 1, or from a 'mask'.")
        return stretched(_numbers(self.levels), size[0])


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(";", ",").replace("\n", ",").split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"'levels' must be numbers from 0 to 1 with commas between, but it is '{text}'.") from None


def _of_mask(mask: Tensor, size: tuple[int, int, int], by_token: bool) -> Tensor:
    """Shares [f h w] from a MASK [n H W]: its pictures over the frames, its pixels averaged over the latent's."""
    shares = torch.nn.functional.interpolate(mask.float()[None, None], size, mode="area")[0, 0].clamp(0, 1)
    if by_token:
        return shares
    mean = shares.mean(dim=(1, 2), keepdim=True)
    if float((shares - mean).abs().max()) > EVEN:
        raise ValueError(
            "This model reads one noise level for each frame, but 'mask' differs within a frame. Give plain masks, one "
            "for each frame, or numbers in 'levels'; LTX-Video takes such a mask."
        )
    return mean
