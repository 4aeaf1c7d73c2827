"""Bytes of tensors that are alive, counted while code runs on tensors that hold nothing.

Under torch's `FakeTensor`s a training step runs with its shapes, types, views, saved tensors and lifetimes, but without
memory and arithmetic: so what it would take can be counted before it is tried, also for a model that would not fit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # upstream's
    """Counts the storages of all tensors that operations make while it is entered, until they are released.

    FSDP2 frees and fills the storages of gathered weights in place (`resize_`): that is counted too. Of a sharded
    tensor its shard is.

    Args:
        blank: Where buffers belong that are made without values and without tensors; None makes them really.

    Attributes:
        live: Bytes of the storages that live now.
        peak: Most of them at once since the last `restart`.
    """

    def __init__(self, blank: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._blank = blank
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._resize: Any = None

    def __enter__(self) -> Self:
        """Watch storages that change their size, which no operation tells."""
        self._resize = resize = torch.UntypedStorage.resize_

        def watched(storage: Any, size: int) -> Any:
            out = resize(storage, size)
            self._resized(storage)
            return out

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: object) -> None:
        """Stop."""
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; their bytes, each storage once."""
        before = self.live
        for tensor in tensors:
            self._count(of_this_rank(tensor))
        return self.live - before

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operations come here, on shards
        if self._blank is not None and func is torch.ops.aten.empty.memory_format:
            with self._blank:
                out = func(*args, **(kwargs or {}))
            self._count(out)
            return out
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _places(args[1]))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.live -= self._seen.pop(key)[1]

        self._seen[key] = (weakref.ref(storage, gone), 0)
        self._resized(storage)

    def _resized(self, storage: Any) -> None:
        """Count a storage that is known as it is now."""
        if id(storage) not in self._seen:
            return
        reference, size = self._seen[id(storage)]
        self._seen[id(storage)] = (reference, storage.nbytes())
        self.live += storage.nbytes() - size
        self.peak = max(self.peak, self.live)


def of_this_rank(tensor: Tensor) -> Tensor:
    """The shard of a sharded tensor, another as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places that they choose: a mask that holds values can be counted, what a fake one chooses cannot."""
    found: list[Tensor | None] = []
    for index in indices:
        found += [index] if index is None or index.dtype != torch.bool else list(index.nonzero().unbind(1))
    return found
