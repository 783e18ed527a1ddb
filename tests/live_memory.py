"""How many bytes of tensors are alive at most while something runs, on any device: exact, unlike what a process holds."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts every storage that an operation makes in the block, until it is freed. most: bytes at the worst moment."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in self._known | given:
                storage = tensor.untyped_storage()
                self._known.add(self._key(tensor))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, self._key(tensor), storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
