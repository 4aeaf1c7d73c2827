"""A memory planner: what a training run takes at its peak, from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from transformers import PreTrainedConfig

from lit_agentrl.doctor.plan_policy import fill, quantizer
from lit_agentrl.doctor.plan_ranks import Ranks, one_of
from lit_agentrl.doctor.plan_rows import made_rows
from lit_agentrl.doctor.plan_step import MakeOptimizer, StepBytes, count_step
from lit_agentrl.models.policy import Attention, DType, Lora, Quantize, Vision, blank_policy
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel
from lit_agentrl.models.sharding import Sharding
from lit_agentrl.types import TrainBatch

__all__ = ["MemoryPlan", "Peak", "Ranks", "Rollouts", "Setup", "kv_bytes", "plan"]

ONE_DEVICE = Ranks()
HALVES = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Rollouts:
    """What an engine in the training process takes at most."""

    cached_tokens: int = 65_536
    """Tokens whose keys and values stay after a call, through the update."""
    batch_tokens: int = 32_768
    """Tokens that are decoded together."""
    batch_size: int = 256
    """Sequences that are."""
    own_weights: bool = False
    """Whether it samples from a copy; of a sharded policy it always does."""


@dataclass(frozen=True)
class Setup:
    """What decides about memory: the options of `LanguageModule`, of the trainer and of the data, by their names."""

    dtype: DType = "float32"
    attention: Attention = "sdpa"
    lora: Lora | None = None
    vision: Vision | None = None
    quantize: Quantize = "none"
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    share_prefix: Literal["auto"] | bool = "auto"
    """Whether a micro-batch is planned, and where it pays computed, by its prefix tree."""
    precision: str = "32-true"
    optimizer: MakeOptimizer = torch.optim.AdamW
    reference: Literal["none", "copy", "average"] = "none"
    """A copy of the trained weights (`frozen`, `sync`), or an average of them in float32 (`ema`)."""
    max_tokens: int = 8192
    max_length: int = 1024
    prompt_tokens: int = 512
    group_size: int = 8
    rollouts: Rollouts | None = field(default_factory=Rollouts)
    device: Literal["cpu", "cuda"] = "cuda"
    """Where it will run; where it is planned does not matter."""


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank."""

    resting: int
    """Weights, gradients and optimiser states that lie on the device all the time."""
    reference: int
    replica: int
    """A copy of the weights to sample from."""
    update: int
    """What a micro-batch, or the optimiser's step, needs above them."""
    cached: int
    """At most: keys and values kept between calls."""
    rollout: int
    """At most: what generation needs above them."""
    host: int
    """In the CPU's memory, where something is offloaded."""

    @property
    def total(self) -> int:
        """The most at once on the device."""
        return self.resting + self.reference + self.replica + self.cached + max(self.update, self.rollout)


@dataclass(frozen=True)
class MemoryPlan:
    """What a setup takes; `peak` says it for a number of ranks."""

    setup: Setup
    step: StepBytes
    """Of one device that holds everything."""
    on_rank: Callable[[Ranks], StepBytes]
    """Counts the step of one of so many ranks of FSDP2, both memories in one: `cpu_offload` changes nothing."""
    copied: int
    """A whole copy of the weights, in the type that a rank of FSDP2 computes in."""
    kv_bytes: int
    """Keys and values of one token."""
    vocabulary: int

    def peak(self, ranks: Ranks = ONE_DEVICE) -> Peak:
        """The parts on one rank.

        Raises:
            UserError: For sharded ranks: the model's layers are not known, or this process is one of several ranks.
        """
        step = self.step if ranks.is_plain else self.on_rank(replace(ranks, cpu_offload=False))
        resting, host = step.resting, step.offloaded
        update = step.pixels + max(step.activations, step.update)
        if ranks.cpu_offload:
            resting, update = 0, step.pixels + step.activations
            # a unit's gradients arrive beside those there are; shards on their way out are gone when all is gathered
            host += step.resting + max(step.update_apart, -(-self.step.unit // ranks.sharded))
        reference = 0
        if self.setup.reference != "none":
            wide = 4 if self.setup.reference == "average" else 0
            num_bytes = max(self.step.trained, self.step.trained * wide // _itemsize(self.setup.dtype))
            reference = -(-num_bytes // ranks.sharded)
            update = max(update, -(-self.step.trained // ranks.sharded))  # the policy's, kept while it is in use
        cached, rollout, replica = self._rollouts(is_sharded=not ranks.is_plain)
        return Peak(resting, reference, replica, update, cached, rollout, host)

    def _rollouts(self, *, is_sharded: bool) -> tuple[int, int, int]:
        """Bytes kept, in use and of a copy of the weights."""
        rollouts = self.setup.rollouts
        if rollouts is None:
            return 0, 0, 0
        logits = 3 * 4 * rollouts.batch_size * self.vocabulary  # as they are, in float32, and at a temperature
        replica = 0
        if is_sharded:
            replica = self.copied
        elif rollouts.own_weights:
            replica = self.step.weights
        return rollouts.cached_tokens * self.kv_bytes, rollouts.batch_tokens * self.kv_bytes + logits, replica


def plan(
    config: PreTrainedConfig,
    setup: Setup = Setup(),
    batch: TrainBatch | None = None,
) -> MemoryPlan:
    """What training a model of this configuration takes; no weights are loaded.

    A training step is run on tensors that hold nothing, and what it would hold is counted. Keys and values of rollouts
    are bounded by the engine's limits.

    Example::

        plan(AutoConfig.from_pretrained("some/folder"), Setup(dtype="bfloat16")).peak(Ranks(sharded=8)).total / 2**30

    Args:
        config: The model's.
        setup: The run's.
        batch: The micro-batch to plan for; by default the longest rows that `max_tokens` allows.
    """
    text = config.get_text_config()
    if batch is None:
        batch = made_rows(
            setup.max_tokens,
            setup.max_length,
            setup.prompt_tokens,
            setup.group_size,
            shared=setup.share_prefix is not False,
            vocabulary=text.vocab_size,
        )
    rows = batch

    @cache
    def on_rank(ranks: Ranks) -> StepBytes:
        policy = _blank(config, setup)
        with one_of(policy, ranks, setup.precision):
            return _count(policy, setup, rows)

    policy = _blank(config, setup)
    step = _count(policy, setup, rows)
    compute = Sharding().dtype(setup.precision)
    copied = sum(p.numel() * (p if compute is None else compute).itemsize for p in policy.lm.parameters())
    return MemoryPlan(setup, step, on_rank, copied, kv_bytes(text, _itemsize(setup.dtype)), text.vocab_size)


def kv_bytes(text: PreTrainedConfig, itemsize: int) -> int:
    """Keys and values of one token, in all layers.

    Args:
        text: The language model's configuration.
        itemsize: Bytes of a number.
    """
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * itemsize)


def _count(policy: PaddedModel, setup: Setup, batch: TrainBatch) -> StepBytes:
    half = HALVES.get(setup.precision.removesuffix("-mixed")) if setup.precision.endswith("-mixed") else None
    return count_step(
        policy,
        batch,
        setup.optimizer,
        autocast=half,
        device=setup.device,
        offloads=setup.offload_activations,
    )


def _blank(config: PreTrainedConfig, setup: Setup) -> PaddedModel:
    """The policy that `LanguageModule` would train, without weights."""
    lm = blank_policy(
        config,
        dtype=setup.dtype,
        attention=setup.attention,
        lora=setup.lora,
        gradient_checkpointing=setup.gradient_checkpointing,
        vision=setup.vision,
        replace=None if setup.quantize == "none" else quantizer(config, setup.dtype),
    )
    if setup.precision.endswith("-true") and (half := HALVES.get(setup.precision.removesuffix("-true"))):
        lm.to(half)  # type: ignore[arg-type]  # Lightning does so, adapters included
    fill(lm)
    if setup.share_prefix is False:
        return PaddedModel(lm, check=False)
    return PrefixGroupedModel(lm, min_reuse=None if setup.share_prefix == "auto" else 1.0, check=False)


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
