"""ControlNets that are computed only when the network looks at their residuals, which a shorter step does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DeferredControl:
    """In the place of a ControlNet: computed when the network asks for its residuals, which a shorter step does not."""

    def __init__(self, control: Any):
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, *args, **kwargs) -> Mapping:
        return DeferredResiduals(lambda: self._control.get_control(*args, **kwargs))


class DeferredResiduals(Mapping):
    """The host's dict of control residuals, computed at the first look into it."""

    def __init__(self, compute):
        self._compute, self._values = compute, None

    def _get(self) -> dict:
        if self._values is None:
            self._values = self._compute() or {}
        return self._values

    def __getitem__(self, name):
        return self._get()[name]

    def __iter__(self):
        return iter(self._get())

    def __len__(self):
        return len(self._get())
