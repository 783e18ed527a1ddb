"""What noise maps are asked for and what is said of them, in the user's words."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.noise_space import NoiseMaps, blended, check_alike, shifted
from ...models.noise_maps import InvertedPicture
from .time_left import duration

FLIPS: dict[str, tuple[int, ...]] = {"none": (), "left to right": (-1,), "upside down": (-2,)}
PRECISIONS = {"half": torch.float16, "float32": torch.float32}


def step_of(maps: NoiseMaps, share: float, what: str) -> int:
    """The step at which a share of the run begins; ValueError where none is left."""
    step = round(share * maps.steps)
    if step >= maps.steps:
        raise ValueError(
            f"'{what}' {share:g} leaves none of the {maps.steps} steps of the noise maps. Set it lower, or invert with "
            "more steps."
        )
    return step


def arranged(inverted: InvertedPicture, flip: str, right: float, down: float) -> InvertedPicture:
    """Flipped, then moved by shares of the picture's width and height, to whole latent pixels."""
    maps, axes = inverted.maps, FLIPS[flip]
    if not axes and not right and not down:
        return inverted
    if maps.picture.ndim < 4:
        raise ValueError("These noise maps are of sound, not of a picture: set 'flip' to none, both shifts to 0.")
    height, width = maps.picture.shape[-2:]
    by = round(down * height), round(right * width)
    return replace(inverted, maps=shifted(maps, *by, axes), latent=inverted.latent.flip(axes).roll(by, (-2, -1)))


def with_other(inverted: InvertedPicture, other: InvertedPicture | None, mask: Tensor | None) -> InvertedPicture:
    """The picture of `other` inside a MASK [b h w]; ValueError where one of the two is missing."""
    if other is None and mask is None:
        return inverted
    if other is None or mask is None:
        missing, there = ("mask", "other_maps") if mask is None else ("other_maps", "mask")
        raise ValueError(f"'{there}' is connected without '{missing}': two pictures are blended by both. Connect both.")
    check_alike(inverted.maps, other.maps)
    shape = inverted.maps.picture.shape
    share = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]).float(), shape[-2:], mode="bilinear").clamp(0, 1)
    counts = len(share), len(other.latent)
    if any(count not in (1, shape[0]) for count in counts):
        raise ValueError(
            f"The noise maps are of {shape[0]} pictures, but 'mask' holds {counts[0]} and 'other_maps' {counts[1]}. "
            "Give one of each, or as many."
        )
    share = share.reshape(len(share), *[1] * (len(shape) - 3), *shape[-2:])
    latent = torch.lerp(inverted.latent, other.latent, share)
    return replace(inverted, maps=blended(inverted.maps, other.maps, share), latent=latent)


def statistics(maps: NoiseMaps) -> tuple[float, float, float]:
    """Smallest and largest spread of a map, and the mean correlation of neighbours; nan where there are too few."""
    if len(maps.maps) < 2:
        nan = float("nan")
        return nan, nan, nan
    flat = [z.float().flatten() for z in maps.maps]
    spreads = [float(z.std()) for z in flat]
    pairs = [float(torch.corrcoef(torch.stack(two))[0, 1]) for two in pairwise(flat)]
    return min(spreads), max(spreads), sum(pairs) / len(pairs)


def inversion_report(maps: NoiseMaps, cfg: float, seconds: float) -> str:
    """What an inversion found, a line each."""
    low, high, together = statistics(maps)
    calls, kind = maps.steps, "Edit-friendly inversion"
    if not maps.eta:
        calls, kind = 2 * maps.steps, "DDIM inversion, its errors recorded"
    size = float(maps.picture.std())
    lines = [
        f"{kind}: {maps.steps} steps from sigma {float(maps.sigmas[0]):.4g}, cfg {cfg:g}, eta {maps.eta:g}; {calls} "
        f"evaluations in {duration(seconds)}.",
        f"{maps.bytes / 1e6:.3g} MB in main memory ({str(maps.maps.dtype).removeprefix('torch.')}).",
        f"The last step alone misses {float(maps.residual.square().mean().sqrt()) / max(size, 1e-9):.2g} of the "
        "picture's spread; 'detail' puts it back.",
    ]
    if maps.eta and low == low:
        lines.insert(1, f"The maps' spread is {low:.3g} to {high:.3g}, neighbours correlate by {together:.2f}.")
    return "\n".join(lines)


def replay_report(maps: NoiseMaps, start: int, variation: float, varied_from: int) -> str:
    """What a replay will do, in a sentence or two."""
    said = f"{maps.steps - start} of {maps.steps} steps, from sigma {float(maps.sigmas[start]):.4g}"
    if variation:
        said += f"; fresh noise by {variation:g} from step {max(varied_from, start) + 1} on"
    return f"{said}. The last step misses nothing with the prompt and cfg of the inversion."


def morph_factors(frames: int, factor: float) -> list[float]:
    """Where between the two pictures each frame lies; one frame lies at `factor`."""
    return [factor] if frames == 1 else [i / (frames - 1) for i in range(frames)]
