"""Bytes of tensors that are alive, counted while code runs on tensors that hold nothing.

Under torch's `FakeTensor`s a training step runs with its shapes, types, views, saved tensors and lifetimes, but without
memory and arithmetic: so what it would take can be counted before it is tried, also for a model that would not fit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # upstream's
    """Counts the storages of all tensors that operations make while it is entered, until they are released.

    Attributes:
        live: Bytes of the storages that live now.
        peak: Most of them at once since the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; their bytes, each storage once."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        return self.live - before

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _places(args[1]))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places that they choose: a mask that holds values can be counted, what a fake one chooses cannot."""
    found: list[Tensor | None] = []
    for index in indices:
        found += [index] if index is None or index.dtype != torch.bool else list(index.nonzero().unbind(1))
    return found
