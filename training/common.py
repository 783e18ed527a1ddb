"""Where training keeps its files, and how a checkpoint is written so that a crash never destroys the last one."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("ATTUNE_TRAINING", ROOT / ".host" / "training"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assets() -> Path:
    """The unpacked emoji pictures; `dev.py train-demo` puts them there."""
    folder = WORK / "package" / "assets"
    if not folder.is_dir():
        raise SystemExit(f"No emoji pictures in {folder}: run `python dev.py train-demo`, which fetches them with npm.")
    return folder


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write `state` beside `path`, then move it into place."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def use_host() -> None:
    """Make ComfyUI's modules importable, set up for this machine; call before importing `comfy`."""
    flags = ["--use-pytorch-cross-attention", *(["--cpu"] if DEVICE.type == "cpu" else [])]
    host = os.environ.get("COMFYUI_PATH") or str(ROOT / ".host" / "comfyui")
    sys.path.insert(0, host)
    own, sys.argv = sys.argv, [sys.argv[0], *flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = own


def pack() -> None:
    """Make the pack's modules importable as `pack.…`, whatever its folder is called; after `use_host`."""
    module = types.ModuleType("pack")
    module.__path__ = [str(ROOT)]
    sys.modules["pack"] = module


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)
