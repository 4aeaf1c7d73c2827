"""A whole copy of a policy's model, to sample from while the policy is sharded, or trained meanwhile."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_agentrl.errors import UserError
from lit_agentrl.models.quantized import is_quantized
from lit_agentrl.models.shards import device_of, reshard, whole

if TYPE_CHECKING:
    from lit_agentrl.models.scoring import PaddedModel


def skeleton_of(lm: nn.Module) -> nn.Module:
    """`lm` with weights that hold nothing (`meta`), and buffers of its own; adapters, hooks and ties as they are.

    FSDP2 modules cannot be copied: take it before the model is sharded.
    """
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in lm.parameters()}
    return copy.deepcopy(lm, dict(empty))


class Replica:
    """A copy of a policy's model with weights of its own, as of the last `refresh`.

    Args:
        policy: Whole or sharded; of a sharded one every rank gets everything.

    Raises:
        UserError: The policy holds quantised weights.
    """

    def __init__(self, policy: PaddedModel) -> None:
        if is_quantized(policy.lm):
            raise UserError(
                "Weights of 4 bits cannot be copied to sample from: use an engine that shares the policy's weights."
            )
        # a copy of the skeleton: two engines must not fill the same one
        self.lm: nn.Module = skeleton_of(policy.skeleton[0] if policy.skeleton else policy.lm).eval()

    @torch.no_grad()
    def refresh(self, policy: PaddedModel) -> None:
        """Take over the policy's weights, in the type that it computes in. Of a sharded policy every rank calls it."""
        reshard(policy)
        device = device_of(policy)
        sources = dict(policy.lm.named_parameters())
        made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight has one name here and several owners
        for name, target in self.lm.named_parameters():
            source = sources[name].detach()
            value = whole(source.to(policy.compute_dtype or source.dtype))
            if target.is_meta:
                made[target] = nn.Parameter(value.to(device, copy=True), requires_grad=False)
            else:
                target.copy_(value)
        if made:
            self._fill(made, device)

    def _fill(self, made: dict[nn.Parameter, nn.Parameter], device: torch.device) -> None:
        for module in self.lm.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                module.register_parameter(name, made[parameter])
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
