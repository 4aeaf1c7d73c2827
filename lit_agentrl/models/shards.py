"""Reading weights that FSDP2 has spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of `module` are sharded, be they gathered just now or not."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def reshard(module: nn.Module) -> None:
    """Return FSDP2 modules to their shards: after a forward the root's weights stay gathered, as copies."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor with its shards gathered (then every rank has to call this); an unsharded one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """`whole`, put together in the CPU's memory: the ranks' GPUs need no room for all of it."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes: of offloaded weights not where they lie."""
    parameter: Any = next(module.parameters())
    if not isinstance(parameter, DTensor):
        return torch.device(parameter.device)
    kind = parameter.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
