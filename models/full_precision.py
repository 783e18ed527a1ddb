"""A few weights of a network out of a file that holds it in full precision, and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .store import shortened

FULL = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
PREFIXES = (
    "model.diffusion_model.",
    "",
    "diffusion_model.",
)  # in checkpoints, alone, as a MODEL has it


def full_weights(path: Path, wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """All of `each_full_weight` at once."""
    return dict(each_full_weight(path, wanted))


def each_full_weight(path: Path, wanted: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """The weights of these names and shapes, at most float32, one by one; those that the file itself rounds are left
    out.

    ValueError where the file is no safetensors file, or one of another network: each shape is compared before anything
    is read.
    """
    with _opened(path) as file:
        names = set(file.keys())
        prefix = next((one for one in PREFIXES if all(one + name in names for name in wanted)), None)
        if prefix is None:
            missing = next(name for name in wanted if not any(one + name in names for one in PREFIXES))
            raise ValueError(
                f"'{path.name}' has no weight '{missing}', so it is not this model in full precision. Choose the file "
                "that the smaller one was made from, in ComfyUI's own format."
            )
        parts = {name: file.get_slice(prefix + name) for name in wanted}
        for name, part in parts.items():
            if list(part.get_shape()) != list(wanted[name]):
                raise ValueError(
                    f"In '{path.name}' the weight '{name}' has the shape {shortened(part.get_shape())}, in this MODEL "
                    f"{list(wanted[name])}: it is another model. Choose the file that the smaller one was made from."
                )
        for name, part in parts.items():
            if part.get_dtype() in FULL:
                yield name, _at_most_float32(file.get_tensor(prefix + name))


def _at_most_float32(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype == torch.float64 else weight.clone()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{path.name}' cannot be read as a safetensors file ({shortened(error)}). Choose another one in "
            "'full_precision'."
        ) from error
