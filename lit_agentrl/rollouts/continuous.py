"""`ContinuousBatchingEngine`: generates in process by transformers' continuous batching over a paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.rollouts.engine import NonFiniteLogitsError, check_contexts, check_params, rollout_seed, uniforms
from lit_agentrl.rollouts.grouped_attention import generation_mode
from lit_agentrl.rollouts.lm_limits import default_stop_ids, max_length, vocab_size
from lit_agentrl.rollouts.paged_session import PagedLimits, PagedSession
from lit_agentrl.rollouts.sampled_weights import InProcessEngine, SampledWeights
from lit_agentrl.rollouts.stop_strings import StopStrings
from lit_agentrl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from lit_agentrl.images import Image
    from lit_agentrl.rollouts.paged_session import PagedAction
    from lit_agentrl.types import SamplingParams


class ContinuousBatchingEngine(InProcessEngine):
    """Samples from the very model that is trained, by transformers' continuous batching: a paged cache, ragged batches.

    For a GPU with flash attention: there the loop replays CUDA graphs and prepares a step while the last one runs.
    With sdpa it builds a mask over the whole cache for every step, and `HFEngine` is faster (docs/engines.md). Actions
    are those of `HFEngine`, seed for seed, up to the rounding of other kernels. Text only.

    Example::

        engine = ContinuousBatchingEngine(max_cached_tokens=131_072)
        engine.sync(policy)  # shares the weights: nothing is copied
        completions = engine.generate([prompt_ids] * 8, SamplingParams(max_new_tokens=512), seeds=range(8))
    """

    def __init__(
        self,
        stop_token_ids: Sequence[int] | None = None,
        max_batch_size: int = 256,
        max_batch_tokens: int = 2_048,
        max_cached_tokens: int = 65_536,
        page_size: int = 256,
        share_prefixes: bool = True,
        use_cuda_graphs: bool | None = None,
        seed: int = 0,
        own_weights: bool = False,
    ) -> None:
        """An engine without a model yet: `sync` brings it.

        Args:
            stop_token_ids: Tokens that end an action; by default the end tokens of the model's generation
                configuration, or else of its configuration.
            max_batch_size: Most sequences decoded together.
            max_batch_tokens: Most tokens of one forward; longer prompts are computed in parts.
            max_cached_tokens: Room for keys and values in tokens (Qwen2.5-7B in bfloat16 takes 57 kB each). Allocated
                as a whole by the first call after a `sync`, held until the next `sync` or `close`. Sequences that do
                not fit wait, and the youngest are computed again.
            page_size: Tokens of a page. Prefixes are shared by whole pages that an earlier forward has filled.
            share_prefixes: Keep the pages of a context for those that begin with the same tokens.
            use_cuda_graphs: None: as transformers thinks best for the attention at hand.
            seed: Randomness of calls without `seeds`.
            own_weights: Sample from a copy of the policy as it was at the last `sync`; of a sharded policy one is made
                in any case.

        Raises:
            UserError: If a limit is not positive, or the cache too small for its pages.
        """
        limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        for name, value in limits.items():
            if value < 1:
                raise UserError(f"ContinuousBatchingEngine: {name}={value} must be at least 1.")
        if page_size < 4:
            raise UserError(f"ContinuousBatchingEngine: page_size={page_size} must be at least 4.")
        if max_cached_tokens < page_size:
            raise UserError(
                f"ContinuousBatchingEngine: max_cached_tokens={max_cached_tokens} has no room for one page of "
                f"page_size={page_size} tokens. Raise the first or lower the second."
            )
        self.stop_token_ids = None if stop_token_ids is None else list(stop_token_ids)
        self.seed = seed
        self._limits = PagedLimits(
            max_batch_size, max_batch_tokens, max_cached_tokens, page_size, share_prefixes, use_cuda_graphs
        )
        super().__init__(SampledWeights("ContinuousBatchingEngine", own_weights))
        self._num_calls = 0
        self._lm: PreTrainedModel | None = None
        self._session: PagedSession | None = None
        self._way: tuple[float, float, int] | None = None

    def sync(self, policy: nn.Module) -> None:
        """Generate with the policy's weights from now on, and give the cache back: the old weights made it.

        Args:
            policy: A transformers (or PEFT) model, or a module that has it as its attribute `lm`; for weights of the
                engine's own a `PaddedModel`. Of a sharded one every rank has to call this.

        Raises:
            UserError: If it is neither, or has adapters that add virtual tokens.
        """
        self.close()
        self._lm = base_lm(self._weights.of(policy))
        self.version += 1

    def close(self) -> None:
        """Give the memory of the cache back; the next `generate` takes it anew."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def generate(
        self,
        contexts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[Completion]:
        """One completion per context, whose tokens depend on its own context, seed and the weights only.

        That is up to rounding: batches of other shapes add up in another order, as in every engine.

        Args:
            contexts: Token ids, B of them.
            params: How to sample.
            seeds: [B]; by default made from the engine's seed and the number of calls so far.
            images: Refused.

        Raises:
            UserError: If there is no model, a parameter or context is out of range, stop strings have no tokenizer, a
                sequence does not fit the cache, or there are images.
            NonFiniteLogitsError: If the weights give NaN.
        """
        lm = self._lm
        if lm is None:
            raise UserError("ContinuousBatchingEngine has no model yet: call sync(policy) before generate().")
        if images is not None and any(images):
            raise UserError(
                "ContinuousBatchingEngine is for text: transformers' paged cache takes no images. HFEngine shows them."
            )
        self._check(lm, contexts, params)
        stop_strings = self._stop_strings(params.stop)
        if seeds is None:
            seeds = [rollout_seed(self.seed, self._num_calls, 0, index, 0) for index in range(len(contexts))]
        if len(seeds) != len(contexts):
            raise ValueError(f"{len(seeds)} seeds for {len(contexts)} contexts: give one each, or none.")
        self._num_calls += 1
        if not contexts:
            return []
        stop_ids = self.stop_token_ids if self.stop_token_ids is not None else default_stop_ids(lm)
        stop_ids = [*stop_ids, *params.stop_token_ids]
        drawn = torch.from_numpy(uniforms(seeds, params.max_new_tokens))
        with generation_mode(lm):
            try:
                actions = self._session_for(lm, params).run(contexts, drawn, stop_ids, stop_strings)
            except BaseException:
                self.close()  # requests of this call may be left in it
                raise
        self._check_finite(actions)
        return [
            _completion(context, action, stop_ids, stop_strings)
            for context, action in zip(contexts, actions, strict=True)
        ]

    def _check(self, lm: PreTrainedModel, contexts: list[list[int]], params: SamplingParams) -> None:
        """Refuse what this engine or the model cannot do."""
        check_params(params)
        check_contexts(contexts, params.max_new_tokens, vocab_size=vocab_size(lm), max_length=max_length(lm))
        longest = max(map(len, contexts), default=0) + params.max_new_tokens
        if longest > self._limits.max_cached_tokens:
            raise UserError(
                f"A context and its action may have {longest} tokens, but ContinuousBatchingEngine has "
                f"max_cached_tokens={self._limits.max_cached_tokens}: raise it, shorten the prompt, or lower "
                "max_new_tokens."
            )
        if torch.is_autocast_enabled(lm.device.type):
            raise UserError(
                "ContinuousBatchingEngine computes in a thread of its own, which autocast does not reach. Call it "
                "outside autocast, or use HFEngine."
            )

    def _stop_strings(self, texts: Sequence[str]) -> StopStrings | None:
        """What finds `texts` in an action; None where there are none."""
        if not texts:
            return None
        if self._tokenizer is None:
            raise UserError(
                f"stop={tuple(texts)!r}: ContinuousBatchingEngine has no tokenizer to read the text of an action with. "
                "Call use_tokenizer(tokenizer) before generate(), or stop by token: stop_token_ids."
            )
        return StopStrings(texts, self._tokenizer)

    def _session_for(self, lm: PreTrainedModel, params: SamplingParams) -> PagedSession:
        """The session that samples this way; another way has another one: captured graphs keep what they sample by."""
        way = (params.temperature, params.top_p, params.top_k)
        if self._session is None or way != self._way:
            self.close()
            self._session, self._way = PagedSession(lm, params, self._limits), way
        return self._session

    def _check_finite(self, actions: Sequence[PagedAction]) -> None:
        """Refuse answers of weights that have diverged."""
        for sequence, action in enumerate(actions):
            for token, logprob in enumerate(action.logprobs):
                if logprob != logprob:
                    raise NonFiniteLogitsError(
                        f"The model's logits are not finite (the weights of sync {self.version}; sequence {sequence}, "
                        f"new token {token}): its weights have diverged or overflow their dtype. Go back to an earlier "
                        "checkpoint and lower the learning rate, or use float32 or bfloat16."
                    )


def _completion(
    context: list[int], action: PagedAction, stop_ids: Sequence[int], stop_strings: StopStrings | None
) -> Completion:
    """In the shape that all engines answer in."""
    tokens = action.token_ids
    has_stopped = tokens[-1] in stop_ids or (stop_strings is not None and stop_strings.is_complete(tokens))
    return Completion(
        token_ids=tokens,
        logprobs=action.logprobs,
        finish="stop" if has_stopped else "length",
        num_cached=action.num_cached,
        num_prefilled=len(context) - action.num_cached,
    )
