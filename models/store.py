"""Files of tensors: written whole or not at all, and read with suspicion."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes its place when the block ends, and is gone if the block fails.

    At any moment, a crash included, `path` is the old file or the new one, whole and on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file in the place of an older one."""
    with written_whole(path) as temporary:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, temporary, metadata=dict(metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError with the reason when it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path.name}' is not a whole safetensors file ({shortened(error)})") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds real numbers with a fraction, all of them finite in float32."""
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def shortened(text: object, most: int = 200) -> str:
    """What a file says, as part of a sentence: one line, not too long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[:most]}…"
