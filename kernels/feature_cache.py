"""Features of earlier steps, kept per condition, held or extrapolated in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoder_propagation import forecast_weight

Features = dict[Hashable, Tensor]  # block -> [rows ...]


@dataclass(frozen=True, eq=False)
class Capture:
    """The features of one call of the network: `chunks` conditions of equally many rows each, in the order of the call.

    signature: whatever must be equal for the features to fit another call (shape of a latent, dtype, device).
    """

    step: int
    time: float
    signature: Hashable
    chunks: int
    features: Features

    def chunk(self, i: int) -> Features:
        return {name: value.chunk(self.chunks)[i] for name, value in self.features.items()}


class FeatureCache:
    """The last `depth` captures of every condition, and outputs that were computed ahead.

    A key names a condition: (its id, the context window, how often it occurred in the evaluation). `dtype` and `device`
    are how features are kept; None leaves them as they come.
    """

    def __init__(self, depth: int, dtype: torch.dtype | None = None, device: torch.device | None = None):
        self.depth, self.dtype, self.device = depth, dtype, device
        self._captures: dict[Hashable, deque[tuple[Capture, int]]] = {}
        self._ahead: dict[Hashable, dict[int, Tensor]] = {}

    def store(self, keys: Sequence[Hashable], step: int, time: float, signature: Hashable, features: Features) -> None:
        """Keep the features of a call whose batch holds the conditions `keys`; a second capture of a step replaces."""
        kept = {name: value.to(dtype=self.dtype, device=self.device) for name, value in features.items()}
        capture = Capture(step, time, signature, len(keys), kept)
        for i, key in enumerate(keys):
            history = self._captures.setdefault(key, deque(maxlen=self.depth))
            if history and history[-1][0].step == step:
                history.pop()
            history.append((capture, i))
            self._ahead.pop(key, None)

    def holds(self, key: Hashable, since: int) -> bool:
        """Whether the condition was captured at step `since` or later."""
        return any(capture.step >= since for capture, _ in self._captures.get(key, ()))

    def recall(
        self,
        keys: Sequence[Hashable],
        signature: Hashable,
        since: int,
        time: float,
        like: Tensor,
        sources: tuple[int, int | None] | None = None,
    ) -> Features | None:
        """The features of a call at `time`, from captures at step `since` or later; None where one of them is missing.

        With two captures of a condition they are extrapolated along the line through both, else held. `sources` names
        the steps of the last capture and of the one before it, for a calibration that compares several.
        """
        parts = []
        for key in keys:
            pair = self._pair(key, signature, since, sources)
            if pair is None:
                return None
            parts.append(pair)
        last, before = ([part[i] for part in parts] for i in (0, 1))
        features = _join(last, like)
        if features is None or None in before:
            return features
        weight = forecast_weight(time, last[0][0].time, before[0][0].time)
        old = _join(before, like) if weight > 0 else None
        if old is None or old.keys() != features.keys():
            return features
        return {name: torch.lerp(old[name], value, 1 + weight) for name, value in features.items()}

    def _pair(self, key, signature, since, sources):
        history = self._captures.get(key, ())
        if sources is not None:
            found = {capture.step: (capture, i) for capture, i in history if capture.signature == signature}
            last, before = found.get(sources[0]), found.get(sources[1])
            missing = last is None or (before is None and sources[1] is not None)
            return None if missing else (last, before)
        if not history or history[-1][0].step < since or history[-1][0].signature != signature:
            return None
        fits = self.depth > 1 and len(history) > 1 and history[-2][0].signature == signature
        return history[-1], history[-2] if fits else None

    def keep_ahead(self, keys: Sequence[Hashable], step: int, output: Tensor) -> None:
        """Keep the network's output at a coming step for a call of `keys`."""
        for key, part in zip(keys, output.chunk(len(keys)), strict=True):
            self._ahead.setdefault(key, {})[step] = part

    def ahead(self, keys: Sequence[Hashable], step: int) -> Tensor | None:
        """The output that was computed ahead for this step, for all of `keys` or not at all."""
        parts = [self._ahead.get(key, {}).get(step) for key in keys]
        if any(part is None for part in parts):
            return None
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()  # type: ignore[arg-type, union-attr]

    @property
    def bytes(self) -> int:
        """What the kept features take."""
        captures = {id(c): c for history in self._captures.values() for c, _ in history}
        return sum(v.numel() * v.element_size() for c in captures.values() for v in c.features.values())

    def clear(self) -> None:
        self._captures.clear()
        self._ahead.clear()


def _join(parts: list[tuple[Capture, int]], like: Tensor) -> Features | None:
    """The chunks as one batch: without a copy where they are a whole capture; None where they do not fit together."""
    first = parts[0][0]
    if len(parts) == first.chunks and all(c is first and i == at for at, (c, i) in enumerate(parts)):
        joined = first.features
    else:
        chunks = [capture.chunk(i) for capture, i in parts]
        if any(chunk.keys() != chunks[0].keys() for chunk in chunks):
            return None
        joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: value.to(like) for name, value in joined.items()}
