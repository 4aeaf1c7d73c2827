"""Which model an engine in process samples from: the policy's own, or a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.fingerprint import policy_fingerprint
from lit_agentrl.models.replica import Replica
from lit_agentrl.models.scoring import PaddedModel
from lit_agentrl.models.shards import is_sharded
from lit_agentrl.types import Engine

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lit_agentrl.types import Fingerprint


class SampledWeights:
    """The policy's own weights while that can be, else a whole copy of them.

    Args:
        engine: What errors call the engine.
        own_weights: Copy in any case; of a sharded policy a copy is made anyway.
    """

    def __init__(self, engine: str, own_weights: bool) -> None:
        self._engine = engine
        self._own_weights = own_weights
        self._replica: Replica | None = None
        self._copied_from: PaddedModel | None = None
        self._lm: PreTrainedModel | PeftModel | None = None

    @property
    def are_shared(self) -> bool:
        """Whether the policy's own tensors are sampled from."""
        return not self._own_weights and self._replica is None

    def of(self, policy: nn.Module) -> PreTrainedModel | PeftModel:
        """The model with the weights that `policy` has now. Of a sharded policy every rank has to call it.

        Raises:
            UserError: If it is not a model, nor a module with one, or cannot be copied.
        """
        lm = policy if isinstance(policy, PreTrainedModel | PeftModel) else getattr(policy, "lm", None)
        if not isinstance(lm, PreTrainedModel | PeftModel):
            raise UserError(
                f"{self._engine}.sync needs a transformers or PEFT model, or a module with one as `.lm`: {policy!r}."
            )
        self._lm = self._copied(policy) if self._own_weights or is_sharded(policy) else lm
        return self._lm

    @property
    def dtype(self) -> torch.dtype | None:
        """What a copy is held in; None where it is as the policy's weights are."""
        return None if self._copied_from is None else self._copied_from.compute_dtype

    def fingerprint(self) -> Fingerprint | None:
        """Of the weights, an adapter merged.

        None before the first sync, for quantised weights, and for a copy in another type than the policy's with the
        adapter beside it: that is not the merged weights in the other type.
        """
        if self._lm is None or (self.dtype is not None and isinstance(self._lm, PeftModel)):
            return None
        return policy_fingerprint(self._lm)

    def _copied(self, policy: nn.Module) -> PreTrainedModel | PeftModel:
        if not isinstance(policy, PaddedModel):
            raise UserError(
                f"{self._engine}.sync: to copy the weights of a policy it needs the module that scores with it "
                f"(PaddedModel, PrefixGroupedModel), not {type(policy).__name__}."
            )
        if self._replica is None or self._copied_from is not policy:
            self._replica, self._copied_from = Replica(policy), policy
        self._replica.refresh(policy)
        lm = self._replica.lm
        assert isinstance(lm, PreTrainedModel | PeftModel)  # a copy of one
        return lm


class InProcessEngine(Engine):
    """What engines in this process share: the weights that they sample from, and how they read actions.

    Args:
        weights: Which they are.
    """

    def __init__(self, weights: SampledWeights) -> None:
        self._weights = weights
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def shares_weights(self) -> bool:
        """Whether the policy's own tensors are sampled from."""
        return self._weights.are_shared

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What a copy is held in; None where it is as the policy's weights are."""
        return self._weights.dtype

    def fingerprint(self) -> Fingerprint | None:
        """Of the weights it samples from, an adapter merged; None where that is not the policy merged."""
        return self._weights.fingerprint()

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the text of actions, which stop strings are looked for in, with this tokenizer from now on."""
        self._tokenizer = tokenizer
