"""LATENTs of films: put frames into one, and take its frames apart."""

from __future__ import annotations

from torch import Tensor

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
