"""What a training strategy cannot do with a policy, said before the policy is loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lit_agentrl.errors import UserError
from lit_agentrl.models.sharding import layers_of
from lit_agentrl.strategies import FSDP2Strategy
from lit_agentrl.types import Engine

if TYPE_CHECKING:
    import lightning as L
    from torch import nn

    from lit_agentrl.methods.language import LanguageModule

log = logging.getLogger(__name__)

INSTEAD = "FSDP2 can: use configs/trainer/fsdp2.yaml, or --trainer.strategy fsdp2."


@runtime_checkable
class Sampler(Protocol):
    """A datamodule that collects rollouts."""

    engine: Engine


def check_strategy(trainer: L.Trainer, module: LanguageModule) -> None:
    """Refuse what the trainer's strategy would break, or end after hours.

    Raises:
        UserError: It says what works instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        _check_fsdp1(trainer, strategy, module)
    elif isinstance(strategy, ModelParallelStrategy):
        _check_fsdp2(trainer, strategy, module)


def wrap_layers(trainer: L.Trainer, lm: nn.Module) -> None:
    """Let FSDP1 shard the decoder layer by layer, where its own options do not say how."""
    if isinstance(strategy := trainer.strategy, FSDPStrategy):
        kinds = {type(layer) for layer in layers_of(lm)}
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(kinds))


def warn_of_frozen_shards(trainer: L.Trainer, policy: nn.Module) -> None:
    """Say it where folders of shards, which hold all weights, would mostly hold what is never trained."""
    if not getattr(trainer.strategy, "_save_distributed_checkpoint", False):
        return
    total = sum(weight.numel() for weight in policy.parameters())
    frozen = sum(weight.numel() for weight in policy.parameters() if not weight.requires_grad)
    if frozen > total / 2 and trainer.is_global_zero:
        log.warning(
            "save_distributed_checkpoint: true writes all weights at every checkpoint, and %.1f %% of them are frozen. "
            "Set it to false: a single file holds the trained ones alone.",
            100 * frozen / total,
        )


def _check_fsdp1(trainer: L.Trainer, strategy: FSDPStrategy, module: LanguageModule) -> None:
    """FSDP1 keeps weights flat outside the training step, so nothing but the step may look at them."""
    datamodule: object = trainer.datamodule  # type: ignore[attr-defined]  # unannotated in Lightning
    is_by_norm = trainer.gradient_clip_algorithm in (None, "norm")
    has_reference = module.reference is not None and module.reference.mode != "none"
    refused = {
        f"{type(datamodule).__name__} samples from the policy": isinstance(datamodule, Sampler),
        f"gradient_clip_val={trainer.gradient_clip_val} clips by norm": bool(trainer.gradient_clip_val) and is_by_norm,
        "the module compares with a reference policy": has_reference,
        "use_orig_params=false mixes the adapter with the weights that it leaves frozen": module.lora is not None
        and not strategy.kwargs["use_orig_params"],
        f"quantize={module.quantize}": module.quantize != "none",
        "vision trains parts that rows of text do not reach": module.vision is not None,
    }
    if found := [reason for reason, applies in refused.items() if applies]:
        raise UserError(f"FSDPStrategy (FSDP1) cannot do this: {'; '.join(found)}. {INSTEAD}")


def _check_fsdp2(trainer: L.Trainer, strategy: ModelParallelStrategy, module: LanguageModule) -> None:
    if module.quantize != "none":
        raise UserError(
            f"quantize={module.quantize}: weights of 4 bits cannot be sharded. Use --trainer.strategy ddp, which keeps "
            "them whole on every rank, or --model.quantize none."
        )
    if trainer.precision == "16-mixed":
        raise UserError(
            "precision=16-mixed scales losses by what all of a rank's gradients allow, which sharded gradients do not "
            "tell. Use bf16-mixed."
        )
    size = strategy.device_mesh["tensor_parallel"].size()
    given = {"lora": module.lora, "vision": module.vision, "compile": module.compiles_layers or None}
    if size > 1 and (also := [name for name, value in given.items() if value is not None]):
        raise UserError(
            f"tensor_parallel_size={size} with {' and '.join(also)}: matrices are split for training all weights of a "
            f"language model, uncompiled. Use tensor_parallel_size=1, which shards all models, or leave out "
            f"{', '.join(f'model.{name}' for name in also)}."
        )
    if size > 1 and not isinstance(strategy, FSDP2Strategy):
        raise UserError(
            f"ModelParallelStrategy: tensor_parallel_size is {size}: its default, auto, is all devices of a node, and "
            "shards over nodes alone. Use FSDP2Strategy, which shards over all ranks, or write both sizes: "
            f"{{data_parallel_size: {trainer.world_size}, tensor_parallel_size: 1}}."
        )
