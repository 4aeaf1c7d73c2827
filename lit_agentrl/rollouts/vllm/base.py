"""What vLLM in this process and vLLM behind a server share: what is asked, how an action ends, and when weights go."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.scoring import PaddedModel
from lit_agentrl.models.shards import reshard
from lit_agentrl.rollouts.engine import NonFiniteLogitsError, check_contexts, check_params, rollout_seed
from lit_agentrl.rollouts.lm_limits import default_stop_ids, max_length, vocab_size
from lit_agentrl.rollouts.stop_strings import StopStrings
from lit_agentrl.rollouts.vllm.answers import Action, Request, Rules, has_nan
from lit_agentrl.rollouts.vllm.weights import Sync, WeightsFolder, check_sync, language_model
from lit_agentrl.types import Engine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lit_agentrl.images import Image
    from lit_agentrl.rollouts.vllm.answers import Answer
    from lit_agentrl.rollouts.vllm.weights import LanguageModel
    from lit_agentrl.types import Completion, SamplingParams

LOWEST_TEMPERATURE = 0.01
"""vLLM raises what lies between it and 0 to it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLimits:
    """What the policy's model can be asked."""

    vocab_size: int
    max_length: int | None
    stop_ids: list[int]
    """Its own end tokens."""


class SyncedEngine(Engine):
    """An engine with weights of its own, which every `sync` brings.

    Its kernels are not the trainer's, so neither are its log-probabilities, to rounding; let methods recompute theirs.
    Log-probabilities are those of the distribution that a token was drawn from: at the temperature, and where `top_p`
    or `top_k` truncate, of what they leave.
    """

    def __init__(self, sync: Sync, folder: str | None, stop_token_ids: Sequence[int] | None, seed: int) -> None:
        name = type(self).__name__
        if sync not in ("full", "adapter"):
            raise UserError(f"{name}: sync={sync!r} must be full or adapter.")
        self.sync_mode: Sync = sync
        self.stop_token_ids = None if stop_token_ids is None else list(stop_token_ids)
        self.seed = seed
        self.weights = WeightsFolder(folder, name)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._limits: ModelLimits | None = None
        self._num_calls = 0
        self._has_warned = False

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hand this tokenizer over with the weights, and read the text of actions with it."""
        self._tokenizer = tokenizer

    def sync(self, policy: nn.Module) -> None:
        """Hand the policy's weights over and forget cached keys and values. Every rank has to call this.

        Raises:
            UserError: The policy cannot be handed over in this way, or there is no tokenizer yet.
            EngineError: vLLM does not take the weights.
        """
        name = type(self).__name__
        lm = language_model(policy, name)
        check_sync(lm, self.sync_mode, name)
        if self._tokenizer is None:
            raise UserError(f"{name} has no tokenizer to hand over: call use_tokenizer(tokenizer) before sync().")
        reshard(policy)
        folder = self.weights.write(lm, self._tokenizer, self.sync_mode)
        computed_in = policy.compute_dtype if isinstance(policy, PaddedModel) else None
        self._take_over(lm, folder, computed_in or lm.dtype)
        if self.sync_mode == "full":
            self.weights.forget_weights()
        inner = base_lm(lm)
        self._limits = ModelLimits(vocab_size(inner), max_length(inner), default_stop_ids(inner))
        self.version += 1

    @abstractmethod
    def _take_over(self, lm: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
        """Use the weights in `folder` as version `self.version + 1`; every rank returns once all may ask for them.

        `dtype` is what the policy computes in.
        """

    @abstractmethod
    def _ask(self, requests: Sequence[Request], params: SamplingParams, rules: Rules) -> list[Answer]:
        """One answer to each request, checked by `rules` or to be checked here."""

    def generate(
        self,
        contexts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[Completion]:
        """One completion per context.

        The same seed gives the same tokens but for rounding: what a request is batched with changes the last bits of
        its logits.

        Raises:
            UserError: There are no weights yet, a parameter or context is out of range, or there are images.
            NonFiniteLogitsError: If the weights give NaN.
            EngineError: vLLM does not answer, or wrongly.
        """
        limits = self._check(contexts, params, images)
        if seeds is None:
            seeds = [rollout_seed(self.seed, self._num_calls, 0, index, 0) for index in range(len(contexts))]
        if len(seeds) != len(contexts):
            raise ValueError(f"{len(seeds)} seeds for {len(contexts)} contexts: give one each, or none.")
        self._num_calls += 1
        own = limits.stop_ids if self.stop_token_ids is None else self.stop_token_ids
        texts = StopStrings(params.stop, self._tokenizer) if params.stop and self._tokenizer is not None else None
        rules = Rules(frozenset((*own, *params.stop_token_ids)), texts, limits.vocab_size)
        actions = [Action(params.max_new_tokens) for _ in contexts]
        running = list(range(len(contexts)))
        while running:
            requests = [_rest(contexts[i], actions[i], seeds[i]) for i in running]
            for i, answer in zip(running, self._ask(requests, params, rules), strict=True):
                if has_nan(answer):
                    raise NonFiniteLogitsError(
                        f"{type(self).__name__}: the logits are not finite (the weights of sync {self.version}): the "
                        "weights have diverged or overflow their dtype. Go back to an earlier checkpoint and lower "
                        "the learning rate, or use float32 or bfloat16."
                    )
                actions[i].extend(answer, rules)
            running = [i for i in running if not actions[i].is_complete]
        return [action.completion(context) for action, context in zip(actions, contexts, strict=True)]

    def _check(
        self, contexts: list[list[int]], params: SamplingParams, images: Sequence[Sequence[Image]] | None
    ) -> ModelLimits:
        name = type(self).__name__
        if self._limits is None:
            raise UserError(f"{name} has no weights yet: call sync(policy) before generate().")
        if images is not None and any(images):
            raise UserError(f"{name} shows no images to the policy: use HFEngine for tasks with images.")
        check_params(params)
        if 0 < params.temperature < LOWEST_TEMPERATURE:
            raise UserError(
                f"{name}: temperature={params.temperature} would silently become {LOWEST_TEMPERATURE} in vLLM. Use 0 "
                f"(greedy) or at least {LOWEST_TEMPERATURE}."
            )
        if (params.top_p < 1 or params.top_k > 0) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: with top_p=%s, top_k=%s log-probabilities are those of the truncated distribution, which tokens "
                "are drawn from; HFEngine reports those of the whole one.",
                name,
                params.top_p,
                params.top_k,
            )
        limits = self._limits
        check_contexts(contexts, params.max_new_tokens, vocab_size=limits.vocab_size, max_length=limits.max_length)
        return limits


def _rest(context: list[int], action: Action, seed: int) -> Request:
    """What is still to be asked of an action."""
    done = len(action.token_ids)
    return Request(
        [*context, *action.token_ids], seed if not done else rollout_seed(seed, done, 0, 0, 0), action.max_tokens - done
    )
