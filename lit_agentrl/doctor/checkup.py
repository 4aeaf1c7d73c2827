"""The examination: a callback that looks at what a fit is about to train on, and ends it before the first step."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Literal, Protocol, cast, runtime_checkable

import lightning as L

from lit_agentrl.callbacks.source import RolloutSource
from lit_agentrl.doctor import rows
from lit_agentrl.doctor.cost import measure_cost
from lit_agentrl.doctor.equality import measure_equality
from lit_agentrl.doctor.findings import Findings
from lit_agentrl.doctor.memory import available_bytes
from lit_agentrl.doctor.noise import measure_noise, precision_name
from lit_agentrl.doctor.passes import Passes, Plan
from lit_agentrl.doctor.plan_report import MemoryFindings, examine_memory
from lit_agentrl.doctor.plan_setup import setup_of
from lit_agentrl.doctor.recommendation import Budget, Sharing, advise
from lit_agentrl.errors import UserError
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.models.lm_parts import attention_traits, base_lm, decoder_of
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel
from lit_agentrl.models.self_check import verify_prefix_sharing
from lit_agentrl.types import TrainBatch

log = logging.getLogger(__name__)

ROUNDS = 11
"""What all but the repeats takes, in padded passes: comparing, copies in other precisions, warming up, memory."""


@runtime_checkable
class Budgeted(Protocol):
    """A datamodule whose micro-batches have a token budget."""

    max_tokens: int
    max_length: int
    """Tokens of the longest row that may come."""


class Checkup(L.Callback):
    """Examines the first optimiser step's rows; afterwards `findings` holds the report.

    Args:
        repeats: Timings of each side.
        seconds: About how long the passes may take; of the rows as many are measured as fit, two at least.
        ckpt_path: A checkpoint to take the weights from.
        weights_only: As in `fit`.
        memory: GiB of a device, to say what fits.

    Raises:
        UserError: For numbers that are not positive.
    """

    def __init__(
        self,
        repeats: int = 3,
        seconds: float = 120.0,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        memory: float | None = None,
    ) -> None:
        if memory is not None and not memory > 0:
            raise UserError(f"memory={memory}: GiB of a device must be more than 0.")
        if repeats < 1 or not seconds > 0:
            raise UserError(f"repeats={repeats}, seconds={seconds}: repeats must be at least 1, seconds more than 0.")
        self.repeats, self.max_seconds = repeats, seconds
        self.ckpt_path, self.weights_only = ckpt_path, weights_only
        self.memory = memory
        self.findings: Findings | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the checkpoint's weights, and nothing else of it: a finished run would have no epoch left."""
        if self.ckpt_path is not None:
            take_weights(trainer, pl_module, self.ckpt_path, self.weights_only)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Examine what was collected; the loop ends before its first batch."""
        trainer.should_stop = True
        if not isinstance(pl_module, LanguageModule):
            raise UserError(f"doctor examines the modules of lit_agentrl.methods, not {type(pl_module).__name__}.")
        step = list(cast("list[TrainBatch]", trainer.train_dataloader))[: trainer.accumulate_grad_batches]
        batches = rows.trained_rows(step)
        if not batches:
            raise UserError(
                "The collection left no row to train on: every episode failed, or was masked. Look at the "
                "environment's errors with `lit-agentrl evaluate`, or raise --num_prompts."
            )
        self.findings = self._examine(trainer, pl_module, batches)

    def _examine(self, trainer: L.Trainer, module: LanguageModule, batches: list[TrainBatch]) -> Findings:
        datamodule: L.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        longest = max(int(batch.lengths.max()) for batch in batches)
        max_tokens, least = batches[0].token_ids.numel(), longest
        if isinstance(datamodule, Budgeted):
            max_tokens, least = datamodule.max_tokens, datamodule.max_length
        policy = cast(PaddedModel, module.policy)
        padded = PaddedModel(policy.lm, check=False)
        grouped, refusal = shared_forward(policy)
        passes = self._chosen(trainer, module, batches, padded)
        plans = rows.padded_plan(passes.rows, max_tokens), rows.packed_plan(passes.rows, max_tokens)
        precision = precision_name(passes, policy)
        noise, equality, backend = None, None, ""
        if isinstance(datamodule, RolloutSource):
            together = plans[1] if module.shares_prefixes else plans[0]
            noise = measure_noise(passes, policy, together, max_tokens, precision)
        if grouped is not None:
            equality = measure_equality(passes, padded, grouped, plans, half="float16" in precision)
            backend = grouped.backend_for(rows.tree_of(passes.rows))
        collected, measured = rows.reuse_of(batches), rows.reuse_of([passes.rows])
        sharing = Sharing(refusal, backend, collected.ratio, measured.ratio)
        cost = measure_cost(passes, padded, grouped, max_tokens, self.repeats)
        memory, unplanned = self._memory(trainer, module, passes, plans[1] if module.shares_prefixes else plans[0])
        return Findings(
            model=f"{type(base_lm(policy.lm)).__name__} ({module.pretrained})",
            precision=precision,
            device=str(passes.device),
            data=_origin(datamodule),
            collected=collected,
            measured=measured,
            repeats=self.repeats,
            is_configured_to_share=module.shares_prefixes,
            sharing=sharing,
            equality=equality,
            cost=cost,
            noise=noise,
            advice=advise(sharing, equality, cost, noise, Budget(max_tokens, least, available_bytes(passes.device))),
            memory=memory,
            unplanned=unplanned,
        )

    def _memory(
        self, trainer: L.Trainer, module: LanguageModule, passes: Passes, plans: Plan
    ) -> tuple[MemoryFindings | None, str]:
        """What was planned and measured, or why nothing was: the rest of the report does not depend on it."""
        policy = cast(PaddedModel, module.policy)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        try:
            device: Literal["cpu", "cuda"] = "cuda" if passes.device.type == "cuda" else "cpu"
            config, setup = setup_of(module, datamodule, str(trainer.precision), device)
            return examine_memory(config, setup, passes, policy, plans, self.memory), ""
        except Exception as error:  # whatever other people's models do on tensors without storage
            log.debug("memory was not planned", exc_info=True)
            return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _chosen(
        self, trainer: L.Trainer, module: LanguageModule, batches: list[TrainBatch], padded: PaddedModel
    ) -> Passes:
        """As many of the first rows as the time allows, judged by one: its first pass warms up, its second counts."""
        everything = rows.weighted(rows.in_tree_order(rows.joined(batches)))
        everything = module.transfer_batch_to_device(everything, module.device, 0)
        passes = Passes(module, trainer.precision_plugin.forward_context, everything)
        began, lengths = time.perf_counter(), everything.lengths.tolist()
        per_token = [passes.seconds(padded, [[0]]) for _ in range(2)][1] / lengths[0]
        allowed = self.max_seconds / (ROUNDS + self.repeats) / per_token
        used, count = 0, 0
        while count < len(lengths) and (count < 2 or used + lengths[count] <= allowed):
            used += lengths[count]
            count += 1
        chosen = rows.select(everything, range(count))
        chosen = replace(chosen, num_action_tokens=int(chosen.action_mask.sum()))
        return replace(passes, rows=chosen, deadline=began + self.max_seconds)


def take_weights(trainer: L.Trainer, module: L.LightningModule, path: str, weights_only: bool | None) -> None:
    """Load the weights of a checkpoint, and nothing else of it."""
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=weights_only)
    module.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)


def shared_forward(policy: PaddedModel) -> tuple[PrefixGroupedModel | None, str]:
    """The shared-prefix forward of the policy's model, without its gate, and why training would not use it, if so.

    None where it cannot run at all, or is known to be wrong. What the start-up check alone refuses is measured too: in
    16 bits the check may take rounding for a mistake.
    """
    own = policy if isinstance(policy, PrefixGroupedModel) else PrefixGroupedModel(policy.lm)
    if not own.is_checked:
        own.is_checked = True
        own.run_check()
    if attention_traits(decoder_of(policy.lm)).unshareable:
        return None, own.refusal
    grouped = PrefixGroupedModel(policy.lm, own.backend, min_reuse=1.0, check=False)  # type: ignore[arg-type]
    if own.refusal:
        try:
            verify_prefix_sharing(grouped)
        except Exception:  # whatever a model raises at a tree: the check has said so already
            return None, own.refusal
    return grouped, own.refusal


def _origin(datamodule: L.LightningDataModule) -> str:
    """Where rows come from, in words."""
    if isinstance(datamodule, RolloutSource):
        episodes = sum(len(group.trajectories) for group in datamodule.groups)
        return f"{episodes} episodes of {len(datamodule.groups)} prompts, played by this policy"
    return f"{type(datamodule).__name__} collects no rollouts: its own rows"
