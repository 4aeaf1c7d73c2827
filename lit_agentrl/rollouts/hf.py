"""`HFEngine`: generates in process, with the very model that is being trained."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.decode import DecodeBatch
from lit_agentrl.rollouts.driver import CausalDriver, UndrivableModelError
from lit_agentrl.rollouts.engine import check_contexts, check_params, rollout_seed
from lit_agentrl.rollouts.grouped_attention import generation_mode, grouped_attention_mode, text_config
from lit_agentrl.rollouts.plain import generate_plain
from lit_agentrl.rollouts.prefix_store import PrefixStore
from lit_agentrl.rollouts.sampling import Actions
from lit_agentrl.rollouts.stop_strings import StopStrings
from lit_agentrl.types import Completion, Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from lit_agentrl.images import Image
    from lit_agentrl.types import SamplingParams


class HFEngine(Engine):
    """Batched sampling from a transformers model, with keys and values shared between prompts, groups and turns.

    A prompt common to a group is computed once; a context that extends what an earlier call saw or sampled since the
    last `sync` costs only its new tokens; a prefix common to several contexts (a system prompt) is computed once;
    sequences that have ended leave the batch.

    Example::

        engine = HFEngine(stop_token_ids=[tokenizer.eos_token_id])
        engine.sync(policy)  # shares the weights: nothing is copied
        completions = engine.generate([prompt_ids] * 8, SamplingParams(max_new_tokens=32), seeds=range(8))
    """

    def __init__(
        self,
        stop_token_ids: Sequence[int] | None = None,
        max_batch_size: int = 256,
        max_batch_tokens: int = 32_768,
        max_prefill_tokens: int = 4_096,
        max_cached_tokens: int = 65_536,
        seed: int = 0,
    ) -> None:
        """An engine without a model yet: `sync` brings it.

        Args:
            stop_token_ids: Tokens that end an action; by default the end tokens of the model's generation
                configuration, or else of its configuration.
            max_batch_size: Most sequences decoded together.
            max_batch_tokens: Most tokens (context and action) decoded together; a single longer sequence runs alone.
            max_prefill_tokens: Most tokens of one prefill forward.
            max_cached_tokens: Most tokens whose keys and values stay after a call. With `max_batch_tokens` it bounds
                the memory: SmolLM2-135M in float32 takes 46 kB a token, Qwen2.5-7B in bfloat16 57 kB.
            seed: Randomness of calls without `seeds`.

        Raises:
            UserError: If a limit is not positive.
        """
        limits = {
            "max_batch_size": max_batch_size,
            "max_batch_tokens": max_batch_tokens,
            "max_prefill_tokens": max_prefill_tokens,
        }
        for name, value in limits.items():
            if value < 1:
                raise UserError(f"HFEngine: {name}={value} must be at least 1.")
        if max_cached_tokens < 0:
            raise UserError(f"HFEngine: max_cached_tokens={max_cached_tokens} must be 0 (keep nothing) or more.")
        self.stop_token_ids = None if stop_token_ids is None else list(stop_token_ids)
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.seed = seed
        self.num_syncs = 0
        self._num_calls = 0
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lm: PreTrainedModel | None = None
        self._driver: CausalDriver | None = None
        self._is_checked = False
        self._store = PrefixStore(max_cached_tokens)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the retained keys and values have room for; at most `max_cached_tokens` between calls."""
        return self._store.num_tokens

    def sync(self, policy: nn.Module) -> None:
        """Generate with the policy's weights from now on, and forget keys and values: the old weights made them.

        Free, because the weights are shared.

        Args:
            policy: A transformers (or PEFT) model, or a module that has it as its attribute `lm`.

        Raises:
            UserError: If it is neither.
        """
        lm = policy if isinstance(policy, PreTrainedModel | PeftModel) else getattr(policy, "lm", None)
        if not isinstance(lm, PreTrainedModel | PeftModel):
            raise UserError(
                f"HFEngine.sync needs a transformers or PEFT model, or a module with one as `.lm`: {policy!r}."
            )
        if lm is not self._lm:
            self._lm = cast("PreTrainedModel", lm)  # a PEFT model forwards what it lacks to the model inside
            self._driver, self._is_checked = None, False
        self._store.clear()
        self.num_syncs += 1

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the text of actions, which stop strings are looked for in, with this tokenizer from now on."""
        self._tokenizer = tokenizer

    def generate(
        self,
        contexts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[Completion]:
        """One completion per context, whose tokens depend on its own context, seed and the weights only.

        Args:
            contexts: Token ids, B of them.
            params: How to sample.
            seeds: [B]; by default made from the engine's seed and the number of calls so far.
            images: [B], what each context has placeholders for.

        Raises:
            UserError: If there is no model, a parameter or context is out of range, or stop strings have no tokenizer.
            NonFiniteLogitsError: If the weights give NaN.
        """
        if self._lm is None:
            raise UserError("HFEngine has no model yet: call sync(policy) before generate().")
        if images is not None and any(images):
            raise UserError("HFEngine cannot show images to the policy yet.")
        check_params(params)
        stop_strings = self._stop_strings(params.stop)
        lm = self._lm
        vocab_size, max_length = _vocab_size(lm), _max_length(lm)
        check_contexts(contexts, params.max_new_tokens, vocab_size=vocab_size, max_length=max_length)
        if seeds is None:
            seeds = [rollout_seed(self.seed, self._num_calls, 0, index, 0) for index in range(len(contexts))]
        if len(seeds) != len(contexts):
            raise ValueError(f"{len(seeds)} seeds for {len(contexts)} contexts: give one each, or none.")
        self._num_calls += 1
        stop_ids = self.stop_token_ids if self.stop_token_ids is not None else default_stop_ids(lm)
        stop_ids = [*stop_ids, *params.stop_token_ids]
        weights = f"the weights of sync {self.num_syncs}"
        actions = Actions(params, seeds, stop_ids, stop_strings=stop_strings, weights=weights)
        with generation_mode(lm):
            num_prefilled = self._run(lm, contexts, params.max_new_tokens, actions)
        return [
            Completion(
                token_ids=actions.token_ids[i],
                logprobs=actions.logprobs[i],
                finish=actions.finish(i),
                num_cached=len(context) - num_prefilled[i],
                num_prefilled=num_prefilled[i],
            )
            for i, context in enumerate(contexts)
        ]

    def _stop_strings(self, texts: Sequence[str]) -> StopStrings | None:
        """What finds `texts` in an action; None where there are none."""
        if not texts:
            return None
        if self._tokenizer is None:
            raise UserError(
                f"stop={tuple(texts)!r}: HFEngine has no tokenizer to read the text of an action with. Call "
                "use_tokenizer(tokenizer) before generate(), or stop by token: stop_token_ids."
            )
        return StopStrings(texts, self._tokenizer)

    def _run(self, lm: PreTrainedModel, contexts: list[list[int]], max_new_tokens: int, actions: Actions) -> list[int]:
        """Complete `actions`; how many tokens were computed for each context."""
        num_prefilled = [len(context) for context in contexts]
        with grouped_attention_mode(lm):
            driver = self._checked_driver(lm)
            for sequences in self._batches(contexts, max_new_tokens):
                if driver is None:
                    generate_plain(lm, [contexts[i] for i in sequences], actions, sequences)
                    continue
                batch = DecodeBatch(
                    driver, self._store, [contexts[i] for i in sequences], max_new_tokens, self.max_prefill_tokens
                )
                batch.run(actions, sequences)
                for sequence, count in zip(sequences, batch.num_prefilled, strict=True):
                    num_prefilled[sequence] = count
        return num_prefilled

    def _checked_driver(self, lm: PreTrainedModel) -> CausalDriver | None:
        """What runs the model over shared keys and values; None, with one warning, where it does not allow that."""
        if not self._is_checked:
            self._is_checked = True
            try:
                driver = CausalDriver(lm)
                driver.check()
                self._driver = driver
            except UndrivableModelError as error:
                warnings.warn(
                    f"HFEngine cannot share keys and values for {type(lm).__name__}: {error}. It recomputes the whole "
                    "sequence for every token instead: correct, but slow.",
                    stacklevel=4,
                )
        return self._driver

    def _batches(self, contexts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Indices of the contexts in batches within the limits; equal contexts and similar lengths stay together."""
        batches: list[list[int]] = []
        current: list[int] = []
        for index in sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), contexts[i])):
            # sorted by length: this context is the longest so far, and every row of a batch is as wide as its longest
            num_tokens = (len(current) + 1) * (len(contexts[index]) + max_new_tokens)
            if current and (len(current) == self.max_batch_size or num_tokens > self.max_batch_tokens):
                batches.append(current)
                current = []
            current.append(index)
        # in a batch the call's order again: a shared prefix counts for the first context that has it
        return [sorted(batch) for batch in ([*batches, current] if current else batches)]


def _vocab_size(lm: PreTrainedModel) -> int:
    """Tokens the model can embed."""
    return len(cast("Tensor", lm.get_input_embeddings().weight))


def _max_length(lm: PreTrainedModel) -> int | None:
    """Positions the model has; None where its configuration does not limit them."""
    length: int | None = getattr(text_config(lm), "max_position_embeddings", None)
    return length


def default_stop_ids(lm: PreTrainedModel) -> list[int]:
    """The end tokens of the model's generation configuration, or else of its configuration."""
    generation = lm.generation_config
    ids = None if generation is None else generation.eos_token_id
    if ids is None:
        ids = text_config(lm).eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
