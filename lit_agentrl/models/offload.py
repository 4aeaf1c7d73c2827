"""Activations in the CPU's memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lit_agentrl.models.shards import is_sharded

SMALL = 2**16
"""Bytes below which a tensor stays: moving it would cost more than it frees."""


@dataclass(frozen=True)
class Away:
    """A tensor in another place."""

    tensor: Tensor
    device: torch.device
    """Where it came from."""


class OffloadActivations(saved_tensors_hooks):
    """While it is entered, what autograd saves for the backward pass goes to the CPU's memory, pinned, and comes back.

    Values come back bit for bit, so gradients do not change. Weights and small tensors stay where they are. What a
    checkpointed layer keeps, its input, goes too. A tensor that several operations save is moved once. Copies are
    queued on the stream that computes: they cost their time, and a later kernel cannot overtake them.

    Args:
        lm: The model whose weights stay.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__(self._pack, self._unpack)
        self._lm = lm
        self._weights = None if is_sharded(lm) else _storages(lm)
        self._moved: dict[int, tuple[weakref.ref[Any], dict[Any, Any]]] = {}

    def moves(self, tensor: Tensor) -> bool:
        """Whether there is something to gain."""
        return is_elsewhere(tensor) and tensor.nbytes >= SMALL and not self._is_weight(tensor)

    def out(self, tensor: Tensor) -> Any:
        """Put a tensor away."""
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return Away(kept.copy_(tensor, non_blocking=True), tensor.device)

    def back(self, away: Any) -> Tensor:
        """The tensor where it was."""
        here: Tensor = away.tensor.to(away.device, non_blocking=True)
        return here

    def _pack(self, tensor: Tensor) -> Any:
        if not self.moves(tensor):
            return tensor
        storage = tensor.untyped_storage()
        reference, parts = self._moved.get(id(storage), (None, {}))
        if reference is None or reference() is not storage:
            parts = {}
            self._moved[id(storage)] = (weakref.ref(storage), parts)
        key = (tensor._version, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in parts:
            parts[key] = self.out(tensor)
        return parts[key]

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else self.back(packed)

    def __exit__(self, *args: object) -> None:
        """Stop; what was put away is released by the graph that needs it."""
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._moved.clear()

    def _is_weight(self, tensor: Tensor) -> bool:
        # FSDP2 gathers a layer's weights for its forward: what they are stored in is known only then
        weights = _storages(self._lm) if self._weights is None else self._weights
        return tensor.untyped_storage()._cdata in weights


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether the tensor lies in another memory than the CPU's."""
    return tensor.device.type != "cpu"


def _storages(lm: nn.Module) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in (*lm.parameters(), *lm.buffers())}
