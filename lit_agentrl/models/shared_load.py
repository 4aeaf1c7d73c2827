"""Loading a model that will be sharded: one rank reads the weights and hands each of the others its part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_agentrl.distributed import world
from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lit_agentrl.models.policy import Policy


class SharedLoad:
    """A model whose weights rank 0 alone has read; every rank has to make one, and to `fill` with it.

    The other ranks build the same model around memory that nothing is written to, which costs no memory until it is:
    sharding keeps only a rank's part of it. So a machine needs room for one copy of the weights, not for one a rank.

    Args:
        load: Gives the model; called with True for its structure alone, on the `meta` device.

    Raises:
        UserError: What `load` raised on rank 0, on all ranks.
    """

    def __init__(self, load: Callable[[bool], Policy]) -> None:
        if world()[0] == 0:
            lm, error = _loaded(load)
            parts = None if lm is None else _description(lm)
            _broadcast((error, parts))
        else:
            error, parts = _broadcast(None)
            lm = None if parts is None else _empty(load(True), *parts)
        if lm is None:
            raise UserError(error)
        self.lm = lm
        self._weights = dict(self.lm.named_parameters())  # sharding replaces them in the model

    @torch.no_grad()
    def fill(self, policy: nn.Module) -> None:
        """Give every rank its part of rank 0's weights; `policy` is the sharded module around `lm`."""
        for name, parameter in policy.lm.named_parameters():  # type: ignore[union-attr, operator]
            assert isinstance(parameter, DTensor)
            weight = self._weights.pop(name).detach()
            device = parameter.device_mesh.device_type
            part = distribute_tensor(weight.to(device), parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(part.to_local())


def _loaded(load: Callable[[bool], Policy]) -> tuple[Policy | None, str]:
    try:
        return load(False), ""
    except UserError as error:
        return None, str(error)


def _description(lm: nn.Module) -> tuple[dict[str, torch.dtype], dict[str, Tensor], Any]:
    """What structure alone does not say: types of the weights, buffers, and how the model ends its answers."""
    dtypes = {name: parameter.dtype for name, parameter in lm.named_parameters()}
    return dtypes, dict(lm.named_buffers()), base_lm(lm).generation_config


def _empty(lm: Policy, dtypes: dict[str, torch.dtype], buffers: dict[str, Tensor], generation_config: Any) -> Policy:
    """`lm`, made on `meta`, around memory that nothing was written to; its buffers are those of rank 0."""
    made = {
        parameter: nn.Parameter(torch.empty(parameter.shape, dtype=dtypes[name]), parameter.requires_grad)
        for name, parameter in lm.named_parameters()
    }
    for path, module in lm.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            module.register_parameter(name, made[parameter])
        for name, _ in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, buffers[f"{path}.{name}".lstrip(".")])
    base_lm(lm).generation_config = generation_config
    return lm


def _broadcast(value: Any) -> Any:
    """Rank 0's `value`."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
