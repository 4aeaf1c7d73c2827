"""A decoder's matrices split over ranks by the plan that transformers ships with the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm, decoder_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
PER_HEAD = "replicated_with_grad_allreduce"
"""How a plan calls weights that every rank holds whole, and applies to its own heads alone."""


def planned(lm: nn.Module, size: int) -> dict[str, str]:
    """How each kind of layer of the decoder in `lm` is split over `size` ranks, by its name with `*` for numbers.

    Raises:
        UserError: There is no plan, it has parts that are not supported, or `size` does not divide the model.
    """
    name, decoder = type(base_lm(lm)).__name__, decoder_of(lm)
    refusal = f"tensor_parallel_size={size}: {name}"
    # an attribute of many configurations, not of all
    plan: dict[str, str] = dict(getattr(decoder.config, "base_model_tp_plan", None) or {})
    if not plan or lm is not base_lm(lm) or decoder is not base_lm(lm).base_model:
        raise UserError(
            f"{refusal} cannot be split: that takes a language model that transformers has a plan for, without adapter "
            "and images. Use tensor_parallel_size=1, which shards all models."
        )
    if others := sorted(set(plan.values()) - {*STYLES, PER_HEAD}):
        raise UserError(f"{refusal}: its plan has {', '.join(others)}, which is not supported. Use 1.")
    for part in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(decoder.config, part) % size:
            raise UserError(f"{refusal}: {part}={getattr(decoder.config, part)} cannot be divided by {size}.")
    return plan


def split(lm: nn.Module, mesh: DeviceMesh) -> None:
    """Split the decoder's matrices over `mesh`, in place; everything else each rank computes alike, whole.

    All weights become DTensors, so that norms and optimisers find one kind. Layers still take and give plain tensors.

    Raises:
        UserError: See `planned`.
    """
    decoder, plan = decoder_of(lm), planned(lm, mesh.size())
    styles: dict[str, Any] = {name: STYLES[how]() for name, how in plan.items() if how in STYLES}
    parallelize_module(decoder, mesh, styles, src_data_rank=None)  # every rank cuts its own part
    names = [name for name, how in plan.items() if how == PER_HEAD]
    per_head = re.compile("|".join(re.escape(name).replace(r"\*", r"\d+") for name in names) or "(?!)")
    heads = {module for name, module in decoder.named_modules() if per_head.fullmatch(name)}
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one
    for module in lm.modules():
        weights = list(module.named_parameters(recurse=False, remove_duplicate=False))
        if not any(isinstance(weight, DTensor) for _, weight in weights) and weights:
            for name, weight in weights:
                if weight not in made:
                    whole = DTensor.from_local(weight.detach(), mesh, [Replicate()], run_check=False)
                    made[weight] = nn.Parameter(whole, requires_grad=weight.requires_grad)
                module.register_parameter(name, made[weight])
            # What a norm of heads is given differs from rank to rank, as rows of a batch would: gradients add up.
            _take_plain_tensors(module, mesh, Shard(0) if module in heads else Replicate())


def shard_dimension(weight: nn.Parameter) -> Shard:
    """Where FSDP2 cuts a weight: across the cut that `split` has made, so that each dimension is cut once."""
    is_cut_in_rows = isinstance(weight, DTensor) and weight.placements[0] == Shard(0) and weight.ndim > 1
    return Shard(1 if is_cut_in_rows else 0)


def _take_plain_tensors(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            DTensor.from_local(each, mesh, [placement], run_check=False)
            if isinstance(each, Tensor) and not isinstance(each, DTensor)
            else each
            for each in given
        )

    def leave(_: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        return output.to_local() if isinstance(output, DTensor) else output

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
