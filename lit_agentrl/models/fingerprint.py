"""Fingerprints of weights: whether two holders of a model hold the same, without moving either's weights.

The moments do not depend on how weights are named, fused, split or sharded, so a trainer and an engine that lays its
weights out otherwise can be compared by three numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer
from torch.distributed.tensor import DTensor

from lit_agentrl import distributed
from lit_agentrl.models.export import merged_layer
from lit_agentrl.models.quantized import is_quantized
from lit_agentrl.types import Fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

CHUNK, CPU_CHUNK = 2**22, 2**18
"""Numbers that exist in float64 at a time: 32 MiB; on a CPU 2 MiB, which stay in its cache while they are read."""


@torch.no_grad()
def policy_fingerprint(lm: nn.Module, dtype: torch.dtype | None = None) -> Fingerprint | None:
    """Of a model's weights, its LoRA adapter merged layer by layer; None for quantised weights, which merge into none.

    Buffers are not weights. A weight that is tied counts once. Of a sharded model every rank calls this, with its
    shards only (`reshard` it first), and gets the whole's.

    Args:
        lm: A transformers model, or a PEFT model around one; it stays as it is.
        dtype: What the merged weights are cast to first, as an engine that holds them in another type did.
    """
    if is_quantized(lm):
        return None
    found = fingerprint(merged_weights(lm), dtype)
    return found if dtype is not None else replace(found, of=lm)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Fingerprint:
    """Moments of all numbers in `tensors`. Shards (DTensors) are added up over the ranks, which all have to call this.

    Args:
        tensors: Of any shapes.
        dtype: What they are cast to first.
    """
    whole, shards, count = _Moments(dtype), _Moments(dtype), 0
    for tensor in tensors:
        count += tensor.numel()
        if isinstance(tensor, DTensor):
            shards.add(tensor.to_local(), _num_copies(tensor))
        else:
            whole.add(tensor)
        del tensor  # a weight that was merged: the next one's memory
    total, squares = whole.read()
    if shards.sums:
        further = distributed.reduce_floats(shards.read(), every_rank=True)
        total, squares = total + further[0], squares + further[1]
    return Fingerprint(count, total, squares)


def distance(one: Fingerprint, other: Fingerprint) -> float:
    """An estimate of |w - w'| / |w|, the relative distance of the weights; infinite where it cannot be one.

    Exact for nothing, but of the right size for differences with random signs, whose sum is about as large as their
    norm; where they share a sign it is larger by up to the root of their number. Rounding of the sums themselves gives
    some 1e-13, and 5e-12 for 1.3e8 numbers.
    """
    if one.count != other.count or not all(map(math.isfinite, (one.total, one.squares, other.total, other.squares))):
        return math.inf
    if one.squares == 0:
        return 0.0 if other.squares == 0 else math.inf
    first = abs(one.total - other.total) / math.sqrt(one.squares)
    second = abs(one.squares - other.squares) * math.sqrt(one.count) / (2 * one.squares)
    return max(first, second)


def merged_weights(lm: nn.Module) -> Iterator[Tensor]:
    """Every weight once, those under an adapter with its update added; one layer is computed at a time."""
    seen: set[int] = set()
    adapted = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    for layer in adapted:
        seen.update(id(parameter) for parameter in layer.parameters())  # type: ignore[attr-defined]
        yield from _merged(layer)
    for parameter in lm.parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter.detach()


def _merged(layer: LoraLayer) -> Iterator[Tensor]:
    if not isinstance(layer, Linear | Embedding) or layer.lora_variant or any(layer.lora_bias.values()):
        yield from (parameter.detach() for parameter in merged_layer(layer).parameters())
        return
    base: nn.Module = layer.get_base_layer()
    for name, parameter in base.named_parameters():
        value = _placed(parameter.detach())
        if name == "weight":
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    value = _sum(value, _update(layer, adapter)).to(value.dtype)
        yield value


def _update(layer: Linear | Embedding, adapter: str) -> Tensor:
    """What an adapter adds to the layer's weight, in new memory; a product of shards is again sharded by rows."""
    weights = dict(layer.named_parameters())
    down, up = weights.get(f"lora_A.{adapter}.weight"), weights.get(f"lora_B.{adapter}.weight")
    if down is None or up is None or not (isinstance(down, DTensor) or down.dtype in (torch.float32, torch.float64)):
        return layer.get_delta_weight(adapter)  # of 16 bits it multiplies in 32 on a CPU
    product = (_placed(up.detach()) @ _placed(down.detach())).mul_(layer.scaling[adapter])
    return product.T if layer.fan_in_fan_out else product  # type: ignore[no-any-return]


def _sum(weight: Tensor, update: Tensor) -> Tensor:
    """Both together, in the update's memory where that can hold it: new memory costs a CPU more than the arithmetic."""
    if isinstance(update, DTensor) or torch.result_type(weight, update) != update.dtype:
        return weight + update
    return update.add_(weight)


def _placed(tensor: Tensor) -> Tensor:
    """Where its shards are exchanged: offloaded ones lie elsewhere."""
    return tensor.to(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor


def _num_copies(tensor: DTensor) -> int:
    """How many ranks hold each number of it."""
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


class _Moments:
    """Sum and sum of squares, [2] float64 on every device that numbers are on; nothing waits before they are read."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self.sums: dict[torch.device, Tensor] = {}
        self._numbers: dict[torch.device, Tensor] = {}  # one memory for all: new memory costs a CPU more than the sums

    def add(self, tensor: Tensor, copies: int = 1) -> None:
        """All numbers of a tensor, or this rank's share in those that `copies` ranks hold."""
        device = tensor.device
        if device not in self.sums:
            self.sums[device] = torch.zeros(2, dtype=torch.float64, device=device)
            self._numbers[device] = self.sums[device].new_empty(CPU_CHUNK if device.type == "cpu" else CHUNK)
        for part in tensor.reshape(-1).split(len(self._numbers[device])):  # type: ignore[no-untyped-call]
            numbers = self._numbers[device][: len(part)].copy_(part.to(self._dtype or part.dtype))
            # squares are summed, not a dot product: that adds up one by one, and rounds a hundred times as much
            self.sums[device] += torch.stack([numbers.sum(), numbers.square_().sum()]) / copies

    def read(self) -> list[float]:
        """Those of all devices together: one wait for each."""
        of_each = [sums.tolist() for sums in self.sums.values()]
        return [sum(values) for values in zip([0.0, 0.0], *of_each, strict=True)]
