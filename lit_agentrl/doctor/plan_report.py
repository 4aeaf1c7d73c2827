"""The planner's findings: a prediction beside a measurement, and what other options would take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from lit_agentrl.doctor.memory import GIB, available_bytes
from lit_agentrl.doctor.passes import Passes
from lit_agentrl.doctor.plan import MemoryPlan, Peak, Ranks, Setup, plan
from lit_agentrl.doctor.plan_measure import measured_step
from lit_agentrl.doctor.plan_rows import filled
from lit_agentrl.doctor.plan_step import StepBytes
from lit_agentrl.doctor.rows import reuse_of, select
from lit_agentrl.errors import UserError
from lit_agentrl.models.policy import Lora
from lit_agentrl.models.scoring import PaddedModel
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.models.vision_families import has_vision
from lit_agentrl.types import TrainBatch

ROOM = 0.8
"""Share of the free memory that a step may be measured in."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A step that was planned, then run."""

    tokens: int
    """Of the micro-batch: unique ones where prefixes are shared, else padded ones."""
    parts: StepBytes
    predicted: int
    measured: int | None
    """None where it was not run."""
    unmeasured: str
    """Why not."""

    @property
    def error(self) -> float | None:
        """Relative, of what the step adds to the weights: those are counted alike in both."""
        if self.measured is None:
            return None
        weights = self.parts.weights
        return (self.predicted - weights) / max(1, self.measured - weights) - 1


@dataclass(frozen=True)
class Option:
    """What one way of training takes."""

    name: str
    device: int
    """Bytes of one rank at its peak, rollouts included."""
    host: int
    """Bytes in the CPU's memory, of one rank."""
    peak: Peak

    def fits(self, gib: float) -> bool:
        """Whether a device with so much memory holds it."""
        return self.device <= gib * GIB


@dataclass(frozen=True)
class MemoryFindings:
    """The report."""

    trial: Trial | None
    """None where nothing was run."""
    max_tokens: int
    """What the options are planned for."""
    kv_bytes: int
    """Keys and values of a token."""
    options: list[Option]
    """The configured one first."""
    memory: float | None
    """GiB of a device, where it was said."""
    images: int | None
    """In the micro-batch that the options are planned for; None for a model of text."""


def try_step(
    config: PreTrainedConfig,
    setup: Setup,
    passes: Passes,
    policy: PaddedModel,
    plans: Sequence[Sequence[int]],
) -> Trial:
    """Predict the largest micro-batch of the measured rows, then run it."""
    shared = setup.share_prefix is not False
    sizes = {tuple(indices): _size(passes.rows, indices, shared=shared) for indices in plans}
    indices = max(sizes, key=lambda each: sizes[each])
    batch = _on_cpu(select(passes.rows, indices))
    parts = plan(config, setup, batch).step
    free = available_bytes(passes.device)
    measured, unmeasured = None, ""
    if free is not None and parts.peak - parts.weights > ROOM * free:
        unmeasured = f"{free / GIB:.1f} GiB are free"
    else:  # even after the deadline: two passes, and what a prediction is worth without them nobody knows
        measured = measured_step(passes, policy, indices)
    return Trial(sizes[indices], parts, parts.peak, measured, unmeasured)


def other_ways(config: PreTrainedConfig, setup: Setup, batch: TrainBatch | None) -> tuple[MemoryPlan, list[Option]]:
    """As configured, and what would take less; planned for a full micro-batch.

    Args:
        config: The model's.
        setup: As configured.
        batch: Rows of a full micro-batch; None for made ones.
    """
    configured = plan(config, setup, batch)
    options = [_option("as configured", configured, Ranks())]
    cheap = setup
    if not setup.gradient_checkpointing:
        cheap = replace(setup, gradient_checkpointing=True)
        recomputed = plan(config, cheap, batch)
        options.append(_option("gradient_checkpointing", recomputed, Ranks()))
    else:
        recomputed = configured
    if setup.lora is None and setup.vision is None:
        adapted = plan(config, replace(cheap, lora=Lora()), batch)
        options.append(_option("gradient_checkpointing, lora (r 16)", adapted, Ranks()))
    if setup.quantize == "none" and setup.vision is None:
        packed = replace(cheap, lora=setup.lora or Lora(), quantize="nf4")
        options.append(_option("gradient_checkpointing, lora, quantize nf4", plan(config, packed, batch), Ranks()))
    if setup.quantize == "none":
        options += _sharded(configured, recomputed)
    return configured, options


def _sharded(configured: MemoryPlan, recomputed: MemoryPlan) -> list[Option]:
    """What FSDP2 would take; nothing, and the log says why, for a model that it does not shard."""
    try:
        return [
            *(_option(f"FSDP2 over {n}", configured, Ranks(n)) for n in (2, 4, 8)),
            _option("FSDP2 over 8, gradient_checkpointing", recomputed, Ranks(8)),
            _option("FSDP2 over 8, the same, cpu_offload", recomputed, Ranks(8, cpu_offload=True)),
        ]
    except UserError as error:
        log.warning("FSDP2 is not planned for: %s", error)
        return []


def examine_memory(
    config: PreTrainedConfig,
    setup: Setup,
    passes: Passes,
    policy: PaddedModel,
    plans: Sequence[Sequence[int]],
    memory: float | None,
) -> MemoryFindings:
    """A step predicted and measured, and all options at the configured budget, for rows like the measured ones."""
    trial = try_step(config, setup, passes, policy, plans)
    vocabulary = config.get_text_config().vocab_size
    rows = _on_cpu(passes.rows)
    batch = filled(rows, setup.max_tokens, shared=setup.share_prefix is not False, vocabulary=vocabulary)
    configured, options = other_ways(config, setup, batch)
    return MemoryFindings(trial, setup.max_tokens, configured.kv_bytes, options, memory, _images(config, batch))


def planned_memory(config: PreTrainedConfig, setup: Setup, memory: float | None) -> MemoryFindings:
    """The options alone, without a model: for the longest rows that the budget allows."""
    configured, options = other_ways(config, setup, None)
    return MemoryFindings(None, setup.max_tokens, configured.kv_bytes, options, memory, _images(config, None))


def _images(config: PreTrainedConfig, batch: TrainBatch | None) -> int | None:
    if not has_vision(config):
        return None
    return len(batch.vision.content_ids) if batch is not None and isinstance(batch.vision, VisionInputs) else 0


def _option(name: str, found: MemoryPlan, ranks: Ranks) -> Option:
    peak = found.peak(ranks)
    return Option(name, peak.total, peak.host, peak)


def _size(rows: TrainBatch, indices: Sequence[int], *, shared: bool) -> int:
    counted = reuse_of([select(rows, indices)])
    return counted.unique_tokens if shared else counted.padded_tokens


def _on_cpu(batch: TrainBatch) -> TrainBatch:
    return replace(
        batch,
        token_ids=batch.token_ids.cpu(),
        lengths=batch.lengths.cpu(),
        action_mask=batch.action_mask.cpu(),
        advantages=batch.advantages.cpu(),
        old_logprobs=batch.old_logprobs.cpu(),
        vision=batch.vision.to("cpu") if isinstance(batch.vision, VisionInputs) else None,
    )
