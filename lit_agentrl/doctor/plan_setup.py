"""What the planner has to know of a run, from its module, its data and its trainer."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

from peft import LoraConfig
from transformers import PreTrainedConfig

from lit_agentrl.doctor.plan import Rollouts, Setup
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.models.policy import Lora
from lit_agentrl.models.pretrained import read_config, resolve
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Engine, SamplingParams

REFERENCES: dict[str, Literal["none", "copy", "average"]] = {"frozen": "copy", "sync": "copy", "ema": "average"}


@runtime_checkable
class Limited(Protocol):
    """A datamodule whose micro-batches and rows are limited."""

    max_tokens: int
    max_length: int


@runtime_checkable
class RollsOut(Protocol):
    """A datamodule that samples its rows."""

    engine: Engine
    sampling: SamplingParams
    num_prompts: int
    group_size: int
    max_length: int


def setup_of(
    module: LanguageModule, datamodule: object, precision: str, device: Literal["cpu", "cuda"]
) -> tuple[PreTrainedConfig, Setup]:
    """The model's configuration, and the run's setup.

    Args:
        module: Its options; the policy is not looked at.
        datamodule: Its limits.
        precision: The trainer's.
        device: Where it will run.
    """
    source = resolve(module.pretrained)
    lora = module.lora if source.adapter is None else _saved(str(source.adapter))
    options: dict[str, Any] = {}
    if isinstance(datamodule, Limited):
        options |= {"max_tokens": datamodule.max_tokens, "max_length": datamodule.max_length}
        options["prompt_tokens"] = datamodule.max_length // 2
    options["rollouts"] = None
    if isinstance(datamodule, RollsOut):
        options["prompt_tokens"] = max(1, datamodule.max_length - datamodule.sampling.max_new_tokens)
        options["group_size"] = datamodule.group_size
        options["rollouts"] = _rollouts(datamodule)
    mode = "none" if module.reference is None else module.reference.mode
    if getattr(module, "kl_coef", 1.0) == 0:
        mode = "none"  # a reference that is never attached
    return read_config(module.pretrained, source), Setup(
        dtype=module.dtype_name,
        attention=module.attention,
        lora=lora,
        vision=module.vision,
        quantize=module.quantize,
        gradient_checkpointing=module.gradient_checkpointing,
        offload_activations=module.offload_activations,
        share_prefix=module.share_prefix if module.policy is None or module.shares_prefixes else False,
        precision=precision,
        optimizer=module.optimizer,
        reference=REFERENCES.get(mode, "none"),
        device=device,
        **options,
    )


def _rollouts(data: RollsOut) -> Rollouts | None:
    """The limits of an engine in this process, and no more than an iteration can fill."""
    engine = data.engine
    if not isinstance(engine, HFEngine):
        return None  # a server, or an engine that reserves its own share of the GPU
    episodes = data.num_prompts * data.group_size
    return Rollouts(
        cached_tokens=min(engine.max_cached_tokens, episodes * data.max_length),
        batch_tokens=min(engine.max_batch_tokens, episodes * data.max_length),
        batch_size=min(engine.max_batch_size, episodes),
        own_weights=not engine.shares_weights,
    )


def _saved(folder: str) -> Lora:
    """The shape of a saved adapter."""
    options = LoraConfig.from_pretrained(folder)
    targets = options.target_modules
    return Lora(options.r, options.lora_alpha, targets=targets if isinstance(targets, str) else sorted(targets or ()))
