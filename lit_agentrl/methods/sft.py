"""Supervised fine-tuning: maximum likelihood of the answers, nothing else."""

from __future__ import annotations

from torch import Tensor

from lit_agentrl.losses import aggregate
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.types import TrainBatch


class SFTModule(LanguageModule):
    """Minimises -(1/N) sum of log p(y_t | x, y_<t) over the N answer tokens of the optimiser step.

    Prompt and tool tokens carry no loss: `TrainBatch.action_mask` marks the answers.
    """

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the negative log-likelihood."""
        self.num_step_tokens = batch.num_action_tokens
        logp = self.score(batch).logprobs
        loss = aggregate(-logp, batch.action_mask, "token_mean", num_tokens=max(1, batch.num_action_tokens))
        self.log_sums({"train/loss": -(logp * batch.action_mask).sum()}, batch)
        return self.scaled(loss)
