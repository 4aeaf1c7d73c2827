"""Fingerprints of weights: whether two holders of a model hold the same, without moving either's weights.

The moments do not depend on how weights are named, fused, split or sharded, so a trainer and an engine that lays its
weights out otherwise can be compared by three numbers.
"""

from __future__ import annotations

import math
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

CHUNK = 2**22
"""Numbers that exist in float64 at a time: 32 MiB."""


@torch.no_grad()
def policy_fingerprint(lm: nn.Module, dtype: torch.dtype | None = None) -> Fingerprint | None:
    """Of a model's weights, its LoRA adapter merged layer by layer; None for quantised weights, which merge into none.

    Buffers are not weights. A weight that is tied counts once. Of a sharded model every rank calls this, with its
    shards only (`reshard` it first), and gets the whole's.

    Args:
        lm: A transformers model, or a PEFT model around one; it stays as it is.
        dtype: What the merged weights are cast to first, as an engine that holds them in another type did.
    """
    return None if is_quantized(lm) else fingerprint(merged_weights(lm), dtype)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Fingerprint:
    """Moments of all numbers in `tensors`. Shards (DTensors) are added up over the ranks, which all have to call this.

    Args:
        tensors: Of any shapes.
        dtype: What they are cast to first.
    """
    whole, shards = [0.0, 0.0], [0.0, 0.0]
    count, is_sharded = 0, False
    for tensor in tensors:
        count += tensor.numel()
        if isinstance(tensor, DTensor):
            is_sharded = True
            sums, copies = _moments(tensor.to_local(), dtype), _num_copies(tensor)
            shards = [total + part / copies for total, part in zip(shards, sums, strict=True)]
        else:
            whole = [total + part for total, part in zip(whole, _moments(tensor, dtype), strict=True)]
    if is_sharded:
        shards = distributed.reduce_floats(shards, every_rank=True)
    return Fingerprint(count, whole[0] + shards[0], whole[1] + shards[1])


def distance(one: Fingerprint, other: Fingerprint) -> float:
    """An estimate of |w - w'| / |w|, the relative distance of the weights; infinite where it cannot be one.

    Exact for nothing, but of the right size for differences with random signs, whose sum is about as large as their
    norm; where they share a sign it is larger by up to the root of their number. Rounding of the sums themselves gives
    some 1e-13.
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
                value = (value + _update(layer, adapter)).to(value.dtype)
        yield value


def _update(layer: Linear | Embedding, adapter: str) -> Tensor | float:
    """What an adapter adds to the layer's weight; a product of shards is again sharded by rows."""
    if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
        return 0.0
    weights = dict(layer.named_parameters())
    down, up = weights.get(f"lora_A.{adapter}.weight"), weights.get(f"lora_B.{adapter}.weight")
    if down is None or up is None or not isinstance(down, DTensor):
        return layer.get_delta_weight(adapter)
    product = (_placed(up.detach()) @ _placed(down.detach())) * layer.scaling[adapter]
    return product.T if layer.fan_in_fan_out else product  # type: ignore[no-any-return]


def _placed(tensor: Tensor) -> Tensor:
    """Where its shards are exchanged: offloaded ones lie elsewhere."""
    return tensor.to(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor


def _num_copies(tensor: DTensor) -> int:
    """How many ranks hold each number of it."""
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def _moments(tensor: Tensor, dtype: torch.dtype | None) -> tuple[float, float]:
    total, squares = 0.0, 0.0
    for part in tensor.reshape(-1).split(CHUNK):  # type: ignore[no-untyped-call]
        numbers = part.to(dtype or part.dtype).double()
        total += float(numbers.sum())
        squares += float(numbers.dot(numbers))
    return total, squares
