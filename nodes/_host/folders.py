"""Where the host finds the pack's own files."""

from __future__ import annotations

from pathlib import Path

import folder_paths

WEIGHTS = Path(__file__).resolve().parents[2] / "models" / "weights"


def register_folders() -> None:
    """List the demo checkpoints in the stock loader, after the user's own folders."""
    folder_paths.add_model_folder_path("checkpoints", str(WEIGHTS))
