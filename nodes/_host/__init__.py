"""Everything that knows how ComfyUI works inside; no mathematics. Its first import says when a host is too old."""

from __future__ import annotations

import re

OLDEST = "0.3.64"  # the first with the node API, the wrappers and the model patcher that the pack is built on


def host_version() -> str:
    """The host's own word; "" from one that does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__


def check_host() -> None:
    """ImportError with what to do on a ComfyUI that is too old. Forks that number in their own way pass."""
    found = host_version()
    if re.match(r"\d+\.\d+", found) and _numbers(found) < _numbers(OLDEST):
        raise ImportError(
            f"ComfyUI-Attune needs ComfyUI {OLDEST} or newer, but this is {found}. Update ComfyUI and start it again."
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


check_host()
