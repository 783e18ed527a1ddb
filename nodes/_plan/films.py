"""Films: LATENTs of their frames, noise beyond a model's window, and each frame's noise level in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.long_noise import shuffled_frames
from ...kernels.timestep_field import Timetable, given_shares, staircase, stretched, together
from .latents import refuse_nested


def film_of(film: dict, start: dict | None, end: dict | None) -> dict:
    """A copy of a LATENT [b c f h w] whose first and last frames are those of `start` and `end`; ValueError for sizes
    that do not go together."""
    samples = _film(film, "film", "a film")
    if samples.ndim != 5:
        raise ValueError(
            "'film' must be a latent of a film, [batch, channels, frames, height, width], but it is "
            f"{list(samples.shape)}: take EmptyHunyuanLatentVideo, or the one of your model."
        )
    parts = [None if one is None else _frames(one, name, samples) for one, name in ((start, "start"), (end, "end"))]
    lengths = [0 if part is None else part.shape[2] for part in parts]
    if sum(lengths) > samples.shape[2]:
        raise ValueError(
            f"The film has {samples.shape[2]} frames, but 'start' and 'end' have {lengths[0]} and {lengths[1]}: make "
            "the film longer."
        )
    whole = samples.clone()
    if parts[0] is not None:
        whole[:, :, : lengths[0]] = parts[0]
    if parts[1] is not None:
        whole[:, :, whole.shape[2] - lengths[1] :] = parts[1]
    return {**film, "samples": whole}


def frames_of(film: dict) -> dict:
    """A LATENT of a film as one of pictures, [b f] of them in a row."""
    samples = film["samples"]
    return {"samples": samples.transpose(1, 2).flatten(0, 1).contiguous()}


def _film(latent: dict, name: str, wanted: str) -> Tensor:
    refuse_nested(latent["samples"], name, wanted)
    return latent["samples"]


def _frames(latent: dict, name: str, film: Tensor) -> Tensor:
    """The frames [1|b c k h w] of a picture, a batch of frames or a film."""
    samples = _film(latent, name, "a picture, a batch of frames or a film")
    if samples.ndim == 4:
        samples = samples.transpose(0, 1)[None]
    if samples.ndim != 5 or samples.shape[1] != film.shape[1] or samples.shape[3:] != film.shape[3:]:
        raise ValueError(
            f"The frames of '{name}' are {list(samples.shape)}, [batch, channels, frames, height, width], and those of "
            f"'film' are {list(film.shape)}: encode a picture of the film's size with the same VAE."
        )
    if samples.shape[0] not in (1, film.shape[0]):
        raise ValueError(
            f"'{name}' holds {samples.shape[0]} films, but 'film' holds {film.shape[0]}. Give one, or as many."
        )
    return samples.to(film)


@dataclass(frozen=True)
class LongNoise:
    """As the host asks a NOISE. Films of one window, and their batch, get the inner noise as it is."""

    noise: Any
    window: int
    stride: int

    @property
    def seed(self) -> int:
        return self.noise.seed

    def generate_noise(self, input_latent: dict) -> Tensor:
        refuse_nested(input_latent["samples"], "latent_image", "a latent of one film")
        drawn = self.noise.generate_noise(input_latent)
        if drawn.ndim != 5:
            raise ValueError(
                "Attune Long-Video Noise: the latent must be a film, [batch, channels, frames, height, width], but it "
                f"is {list(drawn.shape)}."
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = shuffled_frames(drawn.shape[2], self.window, self.stride, generator)
        return drawn[:, :, order]


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
