"""DPO and its relatives: preferences between two answers to one prompt, learnt without a reward model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.methods.preference_terms import (
    ON_IMAGES,
    REFERENCE_FREE,
    PairScores,
    TermOptions,
    check_terms,
    term,
)
from lit_agentrl.models.reference import Reference
from lit_agentrl.types import PreferenceBatch, TrainBatch

log = logging.getLogger(__name__)


class DPOModule(LanguageModule):
    """Minimises a weighted sum of terms, each a mean over all pairs of the optimiser step, on all ranks.

    With w and l the log-probability of the chosen and the rejected answer (summed over its tokens) minus the
    reference's, h = beta (w - l), S the sigmoid, and a bar for means over tokens instead of sums:

    | term | of a pair | source |
    |---|---|---|
    | `sigmoid` | -log S(h); with `label_smoothing` conservative DPO | DPO, arXiv 2305.18290 |
    | `sigmoid_norm` | the same of norm_beta (w̄ - l̄) | length-normalised DPO |
    | `robust` | unbiased under labels flipped with rate `label_smoothing` | arXiv 2403.00409 |
    | `hinge` | max(0, 1 - h) | SLiC, arXiv 2305.10425 |
    | `ipo` | (w̄ - l̄ - 1 / (2 beta))^2 | IPO, arXiv 2310.12036 |
    | `bco_pair` | -log S(beta w) - log S(-beta l) | BCO, arXiv 2404.04656 |
    | `apo_zero` | 1 - S(beta w) + S(beta l) | APO, arXiv 2408.06266 |
    | `dpop` | -log S(h - beta dpop_weight max(0, -w)) | DPO-Positive, arXiv 2402.13228 |
    | `nll` | minus the chosen answer's mean log-probability, no reference | RPO, MPO |
    | `simpo` | -log S(simpo_beta (c̄ - r̄) - simpo_gamma), no reference | SimPO, arXiv 2405.14734 |
    | `orpo` | -log S(log odds c̄ - log odds r̄), no reference | ORPO, arXiv 2403.07691 |
    | `image` | -log S(beta (w - w~)), w~ under a cropped image | mDPO, arXiv 2406.11839 |
    | `anchor` | -log S(beta w - delta) | mDPO |

    RPO is {sigmoid: 1, nll: 1}, MPO {sigmoid: 0.8, bco_pair: 0.2, nll: 1}, ORPO {nll: 1, orpo: 0.1}, mDPO {sigmoid: 1,
    image: 1, anchor: 1}. The `image` term makes the datamodule add a third row to every pair.

    Args:
        losses: The terms and their weights; `sigmoid` alone by default.
        beta: How far the policy may leave its reference: smaller is further.
        label_smoothing: The share of pairs that are assumed to be labelled the wrong way round.
        dpop_weight: Of what `dpop` takes off where the chosen answer falls below the reference.
        ipo: Average log-ratios over tokens, as IPO's authors do, or take sums, as the paper writes.
        norm_beta: The beta of `sigmoid_norm`.
        simpo_beta: The beta of `simpo`.
        simpo_gamma: The margin that `simpo` asks for.
        delta: The reward that `anchor` keeps the chosen answer above.
        reference: What the policy is compared with; None is the policy as training began (`frozen`). `sync` and `ema`
            move at optimiser steps (TR-DPO, arXiv 2404.09656).
        precompute: Compute the reference's log-probabilities of all pairs once, before training, instead of in every
            step; images are then corrupted the same way in every epoch.
        **kwargs: See `LanguageModule`.
    """

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        dpop_weight: float = 5.0,
        ipo: Literal["mean", "sum"] = "mean",
        norm_beta: float = 5.0,
        simpo_beta: float = 2.0,
        simpo_gamma: float = 1.0,
        delta: float = 0.0,
        reference: Reference | None = None,
        precompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.losses = {"sigmoid": 1.0} if losses is None else losses
        self.options = TermOptions(beta, label_smoothing, dpop_weight, ipo, norm_beta, simpo_beta, simpo_gamma, delta)
        check_terms(self.losses, self.options)
        self.reference = self._checked(reference, precompute)
        self.precompute = precompute

    def _checked(self, reference: Reference | None, precompute: bool) -> Reference | None:
        """The reference that the losses need; None where they need none."""
        if set(self.losses) <= set(REFERENCE_FREE):
            if precompute:
                raise UserError(f"precompute: losses={self.losses} have no reference. Set it to false.")
            if reference is not None and reference.mode != "none":
                log.warning("reference.mode=%s is not used: losses=%s have none.", reference.mode, self.losses)
            return None
        reference = reference or Reference("frozen")
        if reference.mode == "none":
            raise UserError(
                f"losses={self.losses} compare with a reference: set --model.reference.mode to frozen or adapter_off "
                f"(or sync, ema), or use {', '.join(REFERENCE_FREE)} alone."
            )
        if precompute and reference.mode not in ("frozen", "adapter_off"):
            raise UserError(
                f"precompute with reference.mode={reference.mode}: what is computed once must not move. Set precompute "
                "to false, or the mode to frozen or adapter_off."
            )
        return reference

    @property
    def corrupts_images(self) -> bool:
        """Whether pairs need a third row: the chosen answer under a corrupted image."""
        return not set(self.losses).isdisjoint(ON_IMAGES)

    @property
    def caches_reference(self) -> bool:
        """Whether batches should come with `reference_sums`."""
        return self.precompute

    def configure_model(self) -> None:
        """Load the policy and tie the reference to it."""
        fresh = self.policy is None
        super().configure_model()
        if fresh and self.policy is not None and self.reference is not None:
            self.reference.attach(self.policy)

    def reference_sums(self, batches: Iterable[PreferenceBatch]) -> list[list[float]]:
        """The reference's log-probability of every row, [B] for each of `batches`, which lie on the CPU."""
        assert self.reference is not None
        assert self.policy is not None
        with self.trainer.precision_plugin.forward_context(), self.reference.using(self.policy):
            moved = (self.transfer_batch_to_device(batch, self.device, 0) for batch in batches)
            return [self._sums(batch).tolist() for batch in moved]

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """One micro-batch of pairs."""
        if not isinstance(batch, PreferenceBatch):
            raise UserError("DPOModule trains on pairs: use --data PreferenceDataModule.")
        if self.corrupts_images and batch.rows_per_pair != 3:
            raise UserError(f"losses={self.losses} need a third row to every pair: the chosen answer, image corrupted.")
        self.num_step_tokens = batch.num_action_tokens
        loss, sums = self.objective(batch)
        share = 1.0 / (batch.num_pairs * batch.num_updates)
        for name, value in sums.items():
            self.log_sum(name, value.detach().float() * share)
        return self.scaled(loss)

    def objective(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, and what is logged of it: sums over its pairs."""
        scores = self._scores(batch)
        terms = {name: term(name, scores, self.options).sum() for name in self.losses}
        total = torch.stack([weight * terms[name] for name, weight in self.losses.items()]).sum()
        sums = {"train/loss": total} | preference_metrics(scores, self.options)
        if len(terms) > 1:
            sums |= {f"train/loss_{name}": value for name, value in terms.items()}
        if "anchor" in terms:
            reward = self.options.beta * scores.logratio[:, 0] - self.options.delta
            sums["train/reward_anchor"] = (reward * scores.is_pair).sum()
        return total / batch.num_pairs, sums

    def _scores(self, batch: PreferenceBatch) -> PairScores:
        """What the policy and its reference say of the batch's pairs."""
        shape = (-1, batch.rows_per_pair)
        reference = self._reference(batch)
        logp = self._sums(batch)
        return PairScores(
            logp.view(shape),
            None if reference is None else reference.view(shape),
            batch.action_mask.sum(-1).view(shape),
        )

    def _reference(self, batch: PreferenceBatch) -> Tensor | None:
        if self.reference is None:
            return None
        if batch.reference_sums is not None:
            return torch.tensor(batch.reference_sums, device=batch.token_ids.device)
        assert self.policy is not None
        self.reference.update(self.policy, self.trainer.global_step)
        with self.reference.using(self.policy):
            return self._sums(batch)

    def _sums(self, batch: PreferenceBatch) -> Tensor:
        """The log-probability of each row's answer, [B]."""
        return self.score(batch).logprobs.sum(-1)  # 0 off the answer


@torch.no_grad()
def preference_metrics(scores: PairScores, options: TermOptions) -> dict[str, Tensor]:
    """Sums over the pairs, each a scalar.

    The reward of an answer is beta log policy / reference; without a reference it is SimPO's, simpo_beta times the mean
    log-probability of its tokens.
    """
    if scores.reference is None:
        rewards = options.simpo_beta * scores.mean(scores.logp)
    else:
        rewards = options.beta * scores.logratio
    margin = rewards[:, 0] - rewards[:, 1]
    values = {
        "train/reward_chosen": rewards[:, 0],
        "train/reward_rejected": rewards[:, 1],
        "train/margin": margin,
        "train/accuracy": (margin > 0).float(),
        "train/logp_chosen": scores.logp[:, 0],
        "train/logp_rejected": scores.logp[:, 1],
        "train/length_gap": (scores.lengths[:, 0] - scores.lengths[:, 1]).float(),
    }
    if rewards.shape[1] == 3:
        shown = scores.lengths[:, 2] > 0
        values["train/reward_corrupted"] = rewards[:, 2] * shown
        values["train/image_accuracy"] = (rewards[:, 0] > rewards[:, 2]).float() * shown
    return {name: (value * scores.is_pair).sum() for name, value in values.items()}
