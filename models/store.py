"""Files: written whole or not at all, never over another, and read with suspicion."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .calibration import Calibration
from .profile_format import parse_profile, spell_profile

SHIPPED = Path(__file__).parent / "profiles"
SUFFIX = ".json"  # of a profile file
LARGEST_PROFILE = 1_000_000  # bytes; a schedule needs a few hundred
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # on Windows


@contextlib.contextmanager
def written_whole(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """A file beside `path` to write into; it takes its place when the block ends, and is gone if the block fails.

    At any moment, a crash included, `path` is the old file or the new one, whole and on the disk. exclusive:
    FileExistsError, and nothing is changed, if `path` exists by then, whoever made it.
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
        if exclusive:
            _claim(path, temporary)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(path: Path, temporary: Path) -> None:
    """Give `temporary` the name `path`, which only one of several can get."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the name first, empty for a moment, then the content
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


# --- profiles ---


def load_profile(path: Path) -> Calibration:
    """Read and check one profile file; ValueError names the file, the field and what was expected."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_PROFILE + 1)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}. Allow reading it, or take it away.") from error
    if len(content) > LARGEST_PROFILE:
        raise ValueError(
            f"{path.name} is no profile: it is larger than the {LARGEST_PROFILE:,} bytes that a profile may have."
        )
    return parse_profile(path.name, content)


def save_profile(calibration: Calibration, folder: Path, name: str = "") -> Path:
    """Write `calibration` into `folder` under a safe form of `name` (default: its own) and return the path.

    The file appears whole or not at all, and no file is ever written over, whoever else saves at the same moment: where
    the name is taken by another calibration, or by what is no profile, the new one gets a number; where it is taken by
    this very calibration, that file is the answer. ValueError, before anything is written, for a calibration that could
    not be read back.
    """
    stem, text = file_stem(name or calibration.name), profile_text(calibration)
    folder.mkdir(parents=True, exist_ok=True)
    for path in numbered(folder, stem, SUFFIX):
        with contextlib.suppress(FileExistsError):
            if not os.path.lexists(path):
                with written_whole(path, exclusive=True) as temporary:
                    temporary.write_text(text, "utf-8")
                return path
        if _id_of(path) == calibration.id:
            return path
    raise AssertionError


def update_profile(path: Path, old: Calibration, new: Calibration) -> Path:
    """Put `new` in the place of `old` in the file at `path`; where that holds something else by now, beside it."""
    if _id_of(path) != old.id:
        return save_profile(new, path.parent, path.stem)
    text = profile_text(new)
    with written_whole(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def profile_text(calibration: Calibration) -> str:
    """The text of a profile file; ValueError for a calibration that could not be read back from it."""
    try:
        text = json.dumps(spell_profile(calibration), indent=1, allow_nan=False) + "\n"
        parse_profile(calibration.name, text.encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"The profile '{calibration.name}' cannot be saved: {error}") from error
    return text


def file_stem(name: str) -> str:
    """A file name for `name` on every system, without the suffix: no folders, no hidden or reserved names."""
    if is_profile_file(name):
        name = name[: -len(SUFFIX)]
    stem = re.sub(r"[^\w .,()+=-]+", "_", name).strip(" .")
    stem = stem.encode()[:100].decode(errors="ignore").strip(" .")  # bytes are what file systems count
    if not re.search(r"\w", stem.replace("_", "")):
        raise ValueError(f"'{name[:100]}' is no file name: use letters or digits in 'name'.")
    return f"_{stem}" if stem.split(".")[0].lower() in RESERVED else stem


def numbered(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """What a file may be called where names are taken: stem, stem (2), stem (3), …"""
    for number in itertools.count(1):
        yield folder / (f"{stem}{suffix}" if number == 1 else f"{stem} ({number}){suffix}")


def is_profile_file(name: str) -> bool:
    """Whether a name is that of a profile file, its suffix in capitals or not."""
    return name.lower().endswith(SUFFIX)


@lru_cache(maxsize=1)
def shipped_profiles() -> dict[str, Calibration]:
    """The pack's own profiles by name, in the order of their file names."""
    return {profile.name: profile for profile in map(load_profile, sorted(SHIPPED.glob("*.json")))}


class ProfileReader:
    """Profile files, each read once until it changes."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[tuple[int, int], Calibration | ValueError]] = {}

    def __call__(self, path: Path) -> Calibration:
        """As `load_profile`."""
        try:
            found = path.stat()
            stamp = found.st_mtime_ns, found.st_size
        except OSError:
            return load_profile(path)  # which says why
        if self._read.get(path, (None,))[0] != stamp:
            try:
                self._read[path] = stamp, load_profile(path)
            except ValueError as error:
                if isinstance(error.__cause__, OSError):
                    raise  # which may be over at the next look, and would not show in the stamp
                self._read[path] = stamp, error
        kept = self._read[path][1]
        if isinstance(kept, ValueError):
            raise ValueError(str(kept))
        return kept


def _id_of(path: Path) -> str:
    try:
        return load_profile(path).id
    except ValueError:
        return ""


# --- tensors ---


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], exclusive: bool = False
) -> None:
    """A safetensors file in the place of an older one; exclusive: FileExistsError where there is one."""
    with written_whole(path, exclusive) as temporary:
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
