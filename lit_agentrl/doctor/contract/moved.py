"""Weights moved a little: fresh adapters are zero and a policy is its own reference, so that gradients would be 0."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_agentrl.models.shards import reshard, whole

if TYPE_CHECKING:
    from torch import Tensor

    from lit_agentrl.methods.language import LanguageModule

SIZE = 0.01
"""Of the root mean square of each weight; the number itself where all of it is 0, as one half of a fresh adapter."""


@torch.no_grad()
def move_weights(module: LanguageModule) -> None:
    """Add noise to every trainable weight, in place: the same in every setting, however weights are sharded."""
    if module.policy is not None:
        reshard(module.policy)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = whole(parameter.detach()).float()
        scale = float(value.square().mean().sqrt()) or 1.0
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * (SIZE * scale)
        parameter.add_(_like(noise, parameter))


def _like(noise: Tensor, parameter: Tensor) -> Tensor:
    """The noise where the parameter is, sharded as it is."""
    moved = noise.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved
