"""The policy-gradient step that GRPO++ and its relatives share: a method says what a trajectory is worth, no more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.losses import (
    Importance,
    aggregate,
    kl_estimate,
    mismatch_metrics,
    policy_loss,
    sequence_mean,
    surrogate_metrics,
    truncated_importance,
)
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.models.reference import Reference
from lit_agentrl.types import Advantages, Credit, TrainBatch, Trajectory, TrajectoryGroup

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]


class PolicyModule(LanguageModule):
    """A policy-gradient method: a subclass says what a trajectory is worth, this class does the rest.

    Args:
        loss: The surrogate (see `lit_agentrl.losses.policy_loss`).
        clip_low: Lower clip range of the ratio (for `gspo` of the sequence ratio).
        clip_high: Upper clip range; above `clip_low` it is DAPO's clip-higher.
        dual_clip: Bound of the loss at `dual_clip * |A|` for negative advantages; None is off.
        cispo_max: Upper bound of CISPO's detached ratio.
        aggregation: How token losses become one number; always over the whole optimiser step and all ranks.
        max_length: The constant of `aggregation: constant` (Dr.GRPO), in tokens.
        kl_coef: Weight of the KL penalty to the reference policy; 0 needs no reference.
        kl: The KL estimator.
        reference: The reference policy.
        entropy_coef: Weight of the entropy bonus.
        old_logprobs: `sampler` takes the engine's log-probabilities as the old policy's; `recompute` scores the rows
            anew. `auto` recomputes where the two differ: an engine with weights of its own, rollouts of an earlier
            policy, or 16-bit arithmetic, whose rounding depends on how rows are batched.
        importance_cap: Where old log-probabilities are recomputed, tokens are weighted by min(pi_old / pi_sampler,
            cap); None is off.
        importance: Whether a token has a weight of its own or that of its row, and whether a weight above the cap is
            truncated to it or 0 (see `lit_agentrl.losses.truncated_importance`).
        overlong: `train` on episodes cut by a token limit, `mask` them out of the loss, or mask episodes cut by any
            limit, steps included (`mask_any`).
        drop_zero_advantage: Leave rows without signal out of the loss and of its denominator.
        **kwargs: See `LanguageModule`.
    """

    group_relative = True
    """Whether `advantages` compares trajectories of a group, so that a group needs two of them."""

    def __init__(
        self,
        loss: Literal["ppo", "gspo", "gspo_token", "cispo", "reinforce"] = "ppo",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        cispo_max: float = 5.0,
        aggregation: Aggregation = "token_mean",
        max_length: int | None = None,
        kl_coef: float = 0.0,
        kl: Literal["k1", "k2", "k3", "k3+"] = "k3",
        reference: Reference | None = None,
        entropy_coef: float = 0.0,
        old_logprobs: Literal["auto", "sampler", "recompute"] = "auto",
        importance_cap: float | None = 2.0,
        importance: Importance = "token_truncate",
        overlong: Literal["train", "mask", "mask_any"] = "train",
        drop_zero_advantage: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kl_coef and (reference is None or reference.mode == "none"):
            raise UserError(
                f"kl_coef={kl_coef} needs a reference policy: set --model.reference.mode to adapter_off, frozen, sync "
                "or ema, or --model.kl_coef to 0."
            )
        if aggregation == "constant" and not max_length:
            raise UserError("aggregation='constant' needs --model.max_length, the tokens every row is divided by.")
        if importance_cap is not None and not importance_cap > 0:
            raise UserError(f"importance_cap={importance_cap}: give a positive number, or null for no weights.")
        self.loss, self.clip_low, self.clip_high, self.dual_clip = loss, clip_low, clip_high, dual_clip
        self.cispo_max, self.aggregation, self.max_length = cispo_max, aggregation, max_length
        self.kl_coef, self.kl, self.reference = kl_coef, kl, reference
        self.entropy_coef, self.old_logprobs, self.importance_cap = entropy_coef, old_logprobs, importance_cap
        self.importance: Importance = importance
        self.overlong, self.drop_zero_advantage = overlong, drop_zero_advantage
        self.credit: Credit = "sum"
        """What a token of a step that trajectories share counts in each of their rows."""
        self.advantage_sums: dict[str, tuple[float, float]] = {}
        """Sum and count of what `batch_advantages` last found, logged as means; the same keys on every rank, always."""

    @abstractmethod
    def advantages(self, group: TrajectoryGroup) -> Advantages:
        """What every step of the group's trajectories is worth, [G][K]. Failed trajectories are already removed."""

    def batch_advantages(self, groups: Sequence[TrajectoryGroup]) -> list[Advantages]:
        """The advantages of all groups of this rank; override it where groups are compared with one another."""
        return [self.advantages(group) for group in groups]

    def trains_on(self, trajectory: Trajectory, advantages: list[float]) -> bool:
        """Whether a trajectory enters the loss (and its denominator)."""
        if self.drop_zero_advantage and not any(advantages):
            return False
        reason = trajectory.stop_reason
        if self.overlong == "mask_any":
            return not reason.is_truncation
        return self.overlong == "train" or not reason.is_token_limit

    def configure_model(self) -> None:
        """Load the policy and tie the reference to it."""
        fresh = self.policy is None
        super().configure_model()
        if fresh and self.policy is not None and self.reference is not None and self.kl_coef:
            self.reference.attach(self.policy)

    def prepare(self, batches: Sequence[TrainBatch]) -> None:
        """Score an iteration's batches before its first update: reference and, where asked for, old log-probabilities.

        The reference policy is refreshed (modes sync and ema) here, so at the borders of iterations.
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            if self.reference is not None and self.kl_coef:
                assert self.policy is not None
                self.reference.update(self.policy, self.trainer.global_step)
                with self.reference.using(self.policy):
                    for batch in batches:
                        batch.reference_logprobs = self.logprobs_of(batch)
            if any(batch.num_updates > 1 and self.recomputes(batch) for batch in batches):
                for batch in batches:
                    batch.sampler_logprobs, batch.old_logprobs = batch.old_logprobs, self.logprobs_of(batch)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the policy-gradient loss."""
        self.num_step_tokens = batch.num_action_tokens
        loss, sums = self.objective(batch)
        maxima = {name: sums.pop(name) for name in [name for name in sums if "/max_" in name]}
        self.log_sums(sums, batch)
        self.log_dict(maxima, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True, batch_size=1)
        self.log_sum("train/loss", loss.detach() / batch.num_updates)
        return self.scaled(loss)

    def objective(self, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, and what is logged of it: sums over its action tokens, and maxima."""
        scores = self.score(batch, entropy=True)
        logp, entropy = scores.logprobs, scores.entropy
        assert entropy is not None
        old, sampler = self._old_logprobs(batch, logp)
        per_token = self._surrogate(logp, old, batch)
        counts = batch.action_mask if batch.weights is None else batch.weights * batch.action_mask
        sums = {"train/entropy": (entropy.detach() * counts).sum()}
        if sampler is not None:
            per_token = self._importance(old, sampler, batch) * per_token
            sums |= self._mismatch(old, sampler, batch)
        if batch.reference_logprobs is not None:
            kl = kl_estimate(logp, batch.reference_logprobs, self.kl)
            per_token = per_token + self.kl_coef * kl
            sums["train/kl"] = (kl.detach() * counts).sum()
        if self.entropy_coef:
            per_token = per_token - self.entropy_coef * entropy
        loss = aggregate(
            per_token,
            batch.action_mask,
            self.aggregation,
            num_tokens=batch.token_denominator,
            num_sequences=batch.row_denominator,
            max_length=self.max_length,
            weights=batch.weights,
        )
        compared = logp, old
        if self.loss in ("gspo", "gspo_token"):  # what is clipped there is the ratio of the whole row
            compared = sequence_mean(logp, batch.action_mask), sequence_mean(old, batch.action_mask)
        metrics = surrogate_metrics(*compared, batch.action_mask, self.clip_low, self.clip_high, weights=batch.weights)
        return loss, sums | {f"train/{name}": metrics[name] for name in ("ratio", "clip_fraction", "approx_kl")}

    def _surrogate(self, logp: Tensor, old: Tensor, batch: TrainBatch) -> Tensor:
        return policy_loss(
            self.loss,
            logp,
            old,
            batch.advantages,
            batch.action_mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            cispo_max=self.cispo_max,
        )

    def recomputes(self, batch: TrainBatch) -> bool:
        """Whether the batch's old log-probabilities are the trainer's own; alike on every rank and in every batch."""
        if self.old_logprobs == "auto":
            return batch.sampler_differs or self._computes_in_16_bits
        return self.old_logprobs == "recompute"

    @property
    def _computes_in_16_bits(self) -> bool:
        precision = "" if self._trainer is None else str(self._trainer.precision)
        return "16" in precision or self.dtype_name in ("bfloat16", "float16")

    def _old_logprobs(self, batch: TrainBatch, logp: Tensor) -> tuple[Tensor, Tensor | None]:
        """The old policy's log-probabilities [B, L], and the sampler's where those are others."""
        if not self.recomputes(batch):
            return batch.old_logprobs, None
        if batch.sampler_logprobs is None:  # one update: the policy that is being differentiated is the old one
            return logp.detach(), batch.old_logprobs
        return batch.old_logprobs, batch.sampler_logprobs

    def _importance(self, old: Tensor, sampler: Tensor, batch: TrainBatch) -> Tensor | float:
        """The weight [B, L] that corrects for the sampler being another policy than the old one."""
        if self.importance_cap is None:
            return 1.0
        return truncated_importance(old, sampler, self.importance_cap, batch.action_mask, kind=self.importance)

    def _mismatch(self, old: Tensor, sampler: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
        options: dict[str, Any] = {"kind": self.importance, "weights": batch.weights}
        found = mismatch_metrics(old, sampler, batch.action_mask, self.importance_cap, **options)
        return {f"mismatch/{name}": value for name, value in found.items()}
