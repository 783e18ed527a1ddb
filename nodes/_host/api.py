"""The host's node API, and the differences between its versions."""

from __future__ import annotations

import dataclasses

try:
    from comfy_api.v0_0_2 import ComfyExtension, io, ui
except ImportError:  # a host that has retired the numbered version
    from comfy_api.latest import ComfyExtension, io, ui

Profile = io.Custom("ATTUNE_PROFILE")

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields) -> io.Schema:
    """A Schema of those `fields` that this host knows: newer ones (search_aliases, …) are dropped on older hosts."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _FIELDS})


__all__ = ["ComfyExtension", "Profile", "io", "schema", "ui"]
