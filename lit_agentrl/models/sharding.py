"""A policy's weights sharded over ranks (FSDP2), layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm, decoder_of
from lit_agentrl.models.quantized import is_quantized
from lit_agentrl.models.replica import skeleton_of
from lit_agentrl.models.tensor_parallel import shard_dimension, split

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from lit_agentrl.models.scoring import PaddedModel

Compute = Literal["auto", "same", "bfloat16", "float16"]


@dataclass(frozen=True)
class Sharding:
    """How a policy is sharded.

    Args:
        compute: What layers are gathered and computed in. `auto` is bfloat16 where `trainer.precision` says so, else
            `same`: as the weights are held. Weights, optimiser and the reduction of gradients keep the weights' type.
        cpu_offload: Keep weights, gradients and optimiser states in the CPU's memory, and compute on the GPU.
        reshard_after_forward: Free a layer's gathered weights after its forward and gather them again for the
            backward: less memory, half as much again to communicate.
    """

    compute: Compute = "auto"
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    def dtype(self, precision: str) -> torch.dtype | None:
        """What layers compute in under a trainer of this precision; None: as the weights are held."""
        compute = self.compute
        if compute == "auto":
            compute = "bfloat16" if precision.startswith("bf16") else "same"
        found: torch.dtype | None = None if compute == "same" else getattr(torch, compute)
        return found


def layers_of(lm: nn.Module) -> list[nn.Module]:
    """The decoder's layers; none where the architecture's are not known."""
    return [module for module in decoder_of(lm).modules() if isinstance(module, GradientCheckpointingLayer)]


def shard(
    policy: PaddedModel,
    mesh: DeviceMesh,
    sharding: Sharding,
    precision: str = "32-true",
    tensor_parallel: DeviceMesh | None = None,
) -> None:
    """Shard the decoder's layers, and what is left with the policy as the root, over `mesh`, in place.

    The vision tower stays with the root: ranks whose rows show no image do not run it, and would not take part in
    gathering its layers.

    Args:
        policy: On any device; what is sharded moves to the mesh's.
        mesh: One dimension.
        sharding: How.
        precision: The trainer's.
        tensor_parallel: Ranks that split the decoder's matrices among them; None, or one, splits nothing.

    Raises:
        UserError: The architecture has no known layers, or its weights are quantised.
    """
    lm = policy.lm
    name = type(base_lm(lm)).__name__
    if is_quantized(lm):
        raise UserError("Weights of 4 bits cannot be sharded: use strategy=ddp with quantize, or quantize: none.")
    layers = layers_of(lm)
    if not layers:
        raise UserError(f"{name} has no layers that could be sharded: use strategy=ddp.")
    policy.skeleton = (skeleton_of(lm),)
    if tensor_parallel is not None and tensor_parallel.size() > 1:
        split(lm, tensor_parallel)
    dtype = policy.compute_dtype = sharding.dtype(precision)
    reduced = None if dtype is None else torch.float32
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced),
        "shard_placement_fn": shard_dimension,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        if sharding.cpu_offload
        else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, reshard_after_forward=sharding.reshard_after_forward, **options)
    fully_shard(policy, **options)
