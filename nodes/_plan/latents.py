"""What a latent holds, in words for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SOUND = "a video with its sound"


def is_nested(samples: Any) -> bool:
    """Whether the samples of a LATENT are several tensors in one, as the host keeps a video with its sound."""
    return bool(getattr(samples, "is_nested", False))


def refuse_nested(samples: Any, name: str, wanted: str = "latents of pictures") -> None:
    """ValueError, by the input's `name`, for a video with its sound."""
    if is_nested(samples):
        raise ValueError(f"'{name}' must be {wanted}, but it holds {SOUND}.")


def latent_text(shape: Sequence[int]) -> str:
    """The shape of what is sampled, [b c ...]; the host packs a video and its sound into [b 1 n] of no meaning."""
    return SOUND if len(shape) == 3 and shape[1] == 1 else str(list(shape))
