"""Noise maps of pictures in files: safetensors, read with suspicion, and refused in a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.noise_space import NoiseMaps
from ..kernels.schedules import check_sigmas
from ..kernels.space import NoiseSpace
from .store import is_finite, save_tensors, shortened

LARGEST_MAPS = 32 << 30  # bytes; 50 steps of a picture of SDXL take 13 MB, of a long video some GB
LONGEST_SCHEDULE = 10_001
FORMAT = "1"  # of the metadata
FACTS = ("family", "config_hash", "weights", "patches", "cfg", "seed")  # what was inverted with what
NUMBERS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class InvertedPicture:
    """Noise maps; the picture as the LATENT that was inverted, [b ...]; and with which model and guidance, as text."""

    maps: NoiseMaps
    latent: Tensor
    facts: Mapping[str, str]


def save_maps(path: Path, inverted: InvertedPicture, exclusive: bool = False) -> Path:
    """Write it whole or not at all; exclusive: FileExistsError where there is a file of that name."""
    maps = inverted.maps
    tensors = {
        "sigmas": maps.sigmas, "states": maps.states, "maps": maps.maps, "residual": maps.residual,
        "picture": maps.picture, "latent": inverted.latent,
    }  # fmt: skip
    said = {"eta": maps.eta, "space": maps.space.kind, "facts": {key: inverted.facts.get(key, "") for key in FACTS}}
    metadata = {"noise_maps_format": FORMAT, "said": json.dumps(said)}
    save_tensors(path, {name: one.clone() for name, one in tensors.items()}, metadata, exclusive)
    return path


def load_maps(path: Path) -> InvertedPicture:
    """What `save_maps` wrote; ValueError names the file and what is wrong with it, sizes before any number is read."""
    try:
        size = path.stat().st_size
        if size > LARGEST_MAPS:
            raise ValueError(f"it has {size:,} bytes, noise maps at most {LARGEST_MAPS:,}")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            types = {name: file.get_slice(name).get_dtype() for name in names}
            eta, kind, facts = _said(file.metadata() or {})
            _check_shapes(shapes, types)
            # Copies: tensors that point into a file go with it.
            read = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{path.name} holds no noise maps ({shortened(error)}). Save them again with Attune Save Noise Maps."
        ) from error
    return _checked(path.name, read, eta, kind, facts)


def maps_in_words(inverted: InvertedPicture) -> str:
    """What is in it, a line each."""
    maps, facts = inverted.maps, inverted.facts
    shape = " x ".join(map(str, maps.picture.shape[1:]))
    lines = [
        f"{len(maps.picture)} of {shape} latents, {maps.steps} steps from sigma {float(maps.sigmas[0]):.4g}, eta "
        f"{maps.eta:g}, {str(maps.maps.dtype).removeprefix('torch.')}, {maps.bytes / 1e6:.3g} MB"
    ]
    lines += [f"{key}: {shortened(facts[key], 300)}" for key in ("family", "cfg", "seed") if facts.get(key)]
    return "\n".join(lines)


def _said(metadata: Mapping[str, str]) -> tuple[float, str, dict[str, str]]:
    """eta, the kind of noise space, and the facts, of a file's metadata."""
    if metadata.get("noise_maps_format") != FORMAT:
        raise ValueError(f"its format is {shortened(metadata.get('noise_maps_format', 'not said'), 40)}, not {FORMAT}")
    said = json.loads(metadata["said"])
    eta, kind, facts = said["eta"], said["space"], said["facts"]
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"its eta is {shortened(eta, 40)}, not 0 to 1")
    if kind not in ("ve", "flow") or not isinstance(facts, dict):
        raise ValueError("its noise space or its facts are not said")
    return float(eta), kind, {key: str(facts.get(key, ""))[:2000] for key in FACTS}


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> None:
    """ValueError unless the tensors of a file belong together."""
    wanted = {"sigmas", "states", "maps", "residual", "picture", "latent"}
    if set(shapes) != wanted:
        raise ValueError(f"its tensors are {shortened(sorted(shapes), 120)}")
    picture, n = shapes["picture"], (shapes["states"] or (0,))[0]
    fits = (
        3 <= len(picture) <= 6
        and all(picture)
        and math.prod(picture) * max(n, 1) < 1 << 40
        and 1 <= n < LONGEST_SCHEDULE
        and shapes["sigmas"] == (n + 1,)
        and shapes["states"] == (n, *picture)
        and shapes["maps"] == (n - 1, *picture)
        and shapes["residual"] == shapes["latent"] == picture
        and all(kind in NUMBERS for kind in types.values())
    )
    if not fits:
        raise ValueError(f"its tensors are {shortened(dict(sorted(shapes.items())), 400)}")


def _checked(name: str, read: Mapping[str, Tensor], eta: float, kind: str, facts: dict[str, str]) -> InvertedPicture:
    try:
        sigmas = check_sigmas(read["sigmas"].double())
        if sigmas[-1] != 0 or (kind == "flow" and sigmas[0] > 1):
            raise ValueError(f"its levels go from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}")
        if not all(is_finite(read[key]) for key in ("residual", "picture", "latent")) or not all(
            is_finite(one) for key in ("states", "maps") for one in read[key]
        ):
            raise ValueError("some of its numbers are not finite")
    except ValueError as error:
        raise ValueError(
            f"{name} holds no noise maps ({shortened(error)}). Save them again with Attune Save Noise Maps."
        ) from error
    space = NoiseSpace("flow" if kind == "flow" else "ve")
    maps = NoiseMaps(sigmas, read["states"], read["maps"], read["residual"], read["picture"], eta, space)
    return InvertedPicture(maps, read["latent"].float(), facts)
