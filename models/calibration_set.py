"""Inputs of a network on disk, one safetensors file a run, whole or absent, for quantisers outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .store import save_tensors, shortened
from .training import MADE, differences

SAMPLES = "samples"  # the key of a file's metadata: how many
MOST_SAMPLES = 1 << 40  # that a file may say it holds


def sample_path(folder: Path, run: str) -> Path:
    return folder / f"samples-{run}.safetensors"


def samples_in(folder: Path, made: Mapping[str, Any]) -> int:
    """How many samples a folder holds; ValueError where some were made with another model or other settings.

    Read from the files' headers alone.
    """
    found = 0
    for path in sorted(folder.glob("samples-*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            count, other = int(facts[SAMPLES]), differences(dict(json.loads(facts[MADE])), made)
            if not 0 <= count <= MOST_SAMPLES:
                raise ValueError(f"it says that it has {shortened(count)}")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} holds no samples ({shortened(error)}). Move it out of that folder.") from error
        if other:
            raise ValueError(
                f"{path} was made with another model or other settings: {shortened(other, 300)}. Choose another "
                "'name', or delete that folder."
            )
        found += count
    return found


def save_samples(path: Path, tensors: Mapping[str, Tensor], made: Mapping[str, Any]) -> None:
    """A run's samples, [n ...] each; FileExistsError where that run has been written before."""
    said = {SAMPLES: str(len(tensors["sigma"])), MADE: json.dumps(dict(made), sort_keys=True)}
    save_tensors(path, tensors, said, exclusive=True)
