"""`HFEngine`: generates in process, with the very model that is being trained."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.vision_families import FAMILIES, family_of, why_images_are_unshareable
from lit_agentrl.rollouts.batches import batches
from lit_agentrl.rollouts.decode import DecodeBatch
from lit_agentrl.rollouts.driver import CausalDriver, UndrivableModelError
from lit_agentrl.rollouts.engine import check_contexts, check_params, rollout_seed
from lit_agentrl.rollouts.grouped_attention import generation_mode, grouped_attention_mode
from lit_agentrl.rollouts.image_tokens import ImageTokens
from lit_agentrl.rollouts.lm_limits import default_stop_ids, max_length, vocab_size
from lit_agentrl.rollouts.plain import generate_plain
from lit_agentrl.rollouts.prefix_store import PrefixStore
from lit_agentrl.rollouts.sampled_weights import InProcessEngine, SampledWeights
from lit_agentrl.rollouts.sampling import Actions
from lit_agentrl.rollouts.stop_strings import StopStrings
from lit_agentrl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lit_agentrl.images import Image, ImageReader
    from lit_agentrl.types import SamplingParams


class HFEngine(InProcessEngine):
    """Batched sampling from a transformers model, with keys and values shared between prompts, groups and turns.

    A prompt common to a group is computed once; a context that extends what an earlier call saw or sampled since the
    last `sync` costs only its new tokens; a prefix common to several contexts (a system prompt) is computed once;
    sequences that have ended leave the batch. Images are part of the context: what is shared shows the same ones, and
    each is encoded once.

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
        own_weights: bool = False,
    ) -> None:
        """An engine without a model yet: `sync` brings it.

        Args:
            stop_token_ids: Tokens that end an action; by default the end tokens of the model's generation
                configuration, or else of its configuration.
            max_batch_size: Most sequences decoded together.
            max_batch_tokens: Most tokens (context and action) decoded together; a single longer sequence runs alone.
            max_prefill_tokens: Most tokens of one prefill forward, and most image features of one forward of the
                vision tower; a single larger image runs alone.
            max_cached_tokens: Most tokens whose keys and values stay after a call, and most image features that do.
                With `max_batch_tokens` it bounds the memory: SmolLM2-135M in float32 takes 46 kB a token, Qwen2.5-7B
                in bfloat16 57 kB.
            seed: Randomness of calls without `seeds`.
            own_weights: Sample from a copy of the policy as it was at the last `sync`, while the policy trains on. Of a
                sharded policy a copy is made in any case: ranks generate for different numbers of steps, and could
                not gather layers together.

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
        self.max_cached_tokens = max_cached_tokens
        self.seed = seed
        super().__init__(SampledWeights("HFEngine", own_weights))
        self._num_calls = 0
        self._reader: ImageReader | None = None
        self._images: ImageTokens | None = None
        self._lm: PreTrainedModel | None = None
        self._driver: CausalDriver | None = None
        self._is_checked = False
        self._has_refused_images = False
        self._store = PrefixStore(max_cached_tokens)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the retained keys and values have room for; at most `max_cached_tokens` between calls."""
        return self._store.num_tokens

    def sync(self, policy: nn.Module) -> None:
        """Generate with the policy's weights from now on, and forget keys and values: the old weights made them.

        Free where the weights are shared.

        Args:
            policy: A transformers (or PEFT) model, or a module that has it as its attribute `lm`; for weights of the
                engine's own a `PaddedModel`. Of a sharded one every rank has to call this.

        Raises:
            UserError: If it is neither.
        """
        lm = self._weights.of(policy)
        if lm is not self._lm:
            self._lm = cast("PreTrainedModel", lm)  # a PEFT model forwards what it lacks to the model inside
            self._driver, self._images = None, None
            self._is_checked = self._has_refused_images = False
        self._forget()
        self.version += 1

    def use_image_reader(self, reader: ImageReader) -> None:
        """Show images to the policy by this reader from now on; the placeholder token is never sampled any more."""
        self._reader, self._images = reader, None
        self._forget()

    def _forget(self) -> None:
        """Forget keys, values and image features, and with them what contexts have shown."""
        self._store.clear()
        if self._images is not None:
            self._images.clear()

    def generate(
        self,
        contexts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[Completion]:
        """One completion per context, whose tokens depend on its own context, images, seed and the weights only.

        Args:
            contexts: Token ids, B of them.
            params: How to sample.
            seeds: [B]; by default made from the engine's seed and the number of calls so far.
            images: [B], what each context has placeholders for, in order; None where no context shows one.

        Raises:
            UserError: If there is no model, a parameter or context is out of range, stop strings have no tokenizer,
                images have no reader or a model without vision, or do not fill the placeholders of their context.
            NonFiniteLogitsError: If the weights give NaN.
        """
        if self._lm is None:
            raise UserError("HFEngine has no model yet: call sync(policy) before generate().")
        check_params(params)
        stop_strings = self._stop_strings(params.stop)
        lm = self._lm
        check_contexts(contexts, params.max_new_tokens, vocab_size=vocab_size(lm), max_length=max_length(lm))
        if seeds is None:
            seeds = [rollout_seed(self.seed, self._num_calls, 0, index, 0) for index in range(len(contexts))]
        if len(seeds) != len(contexts):
            raise ValueError(f"{len(seeds)} seeds for {len(contexts)} contexts: give one each, or none.")
        self._num_calls += 1
        stop_ids = self.stop_token_ids if self.stop_token_ids is not None else default_stop_ids(lm)
        stop_ids = [*stop_ids, *params.stop_token_ids]
        weights = f"the weights of sync {self.version}"
        shown = self._image_tokens(lm, has_images=images is not None and any(images))
        # an action must not hold a placeholder: nothing would stand there in the next turn and in training
        excluded = () if shown is None else (shown.image_token_id,)
        actions = Actions(params, seeds, stop_ids, stop_strings=stop_strings, excluded=excluded, weights=weights)
        try:
            with generation_mode(lm):
                keyed = contexts if shown is None else shown.keyed(contexts, images or [()] * len(contexts))
                num_prefilled = self._run(lm, keyed, params.max_new_tokens, actions, shown)
        finally:
            if shown is not None:
                shown.end_call()
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

    def _image_tokens(self, lm: PreTrainedModel, has_images: bool) -> ImageTokens | None:
        """What tells the pictures of contexts apart; None where there is no reader, or a model of text alone."""
        if self._reader is None and not has_images:
            return None
        config = base_lm(lm).config
        if has_images:
            family_of(config)  # first of all: the model has to see images
        elif config.model_type not in FAMILIES:
            return None
        if self._reader is None:
            raise UserError("HFEngine was given images but no reader: call use_image_reader(reader) before generate().")
        if self._images is None:
            limits = {"max_tokens": self._store.max_tokens, "max_encoded": self.max_prefill_tokens}
            self._images = ImageTokens(lm, self._reader, vocab_size(lm), **limits)
        return self._images

    def _run(
        self,
        lm: PreTrainedModel,
        contexts: list[list[int]],
        max_new_tokens: int,
        actions: Actions,
        images: ImageTokens | None,
    ) -> list[int]:
        """Complete `actions`; how many tokens were computed for each context."""
        num_prefilled = [len(context) for context in contexts]
        with grouped_attention_mode(lm):
            driver = self._checked_driver(lm)
        shown = [images is not None and images.are_shown(context) for context in contexts]
        refuses_images = any(shown) and self._recomputes_images(lm)
        shared = [driver is not None and not (refuses_images and has_images) for has_images in shown]
        limits = {"max_size": self.max_batch_size, "max_tokens": self.max_batch_tokens}
        for is_shared in (False, True):
            indices = [i for i, is_alike in enumerate(shared) if is_alike == is_shared]
            for sequences in batches(contexts, indices, max_new_tokens, **limits):
                batch_contexts = [contexts[i] for i in sequences]
                batch_images = images if any(shown[i] for i in sequences) else None
                if driver is None or not is_shared:
                    # with the model's own attention: for ours it would leave masks, such as a sliding window, to us
                    generate_plain(lm, batch_contexts, actions, sequences, batch_images)
                else:
                    with grouped_attention_mode(lm):
                        batch = DecodeBatch(
                            driver, self._store, batch_contexts, max_new_tokens, self.max_prefill_tokens, batch_images
                        )
                        batch.run(actions, sequences)
                    for sequence, count in zip(sequences, batch.num_prefilled, strict=True):
                        num_prefilled[sequence] = count
                if batch_images is not None:
                    batch_images.features.evict()
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
                self._warn(f"{type(lm).__name__}: {error}")
        return self._driver

    def _recomputes_images(self, lm: PreTrainedModel) -> bool:
        """Whether keys and values of contexts with images may not be shared; the first time, with a warning."""
        reason = why_images_are_unshareable(base_lm(lm).config)
        if reason and not self._has_refused_images:
            self._has_refused_images = True
            self._warn(f"contexts with images of {type(base_lm(lm)).__name__}: {reason}")
        return bool(reason)

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"HFEngine cannot share keys and values for {what}. It recomputes the whole sequence for every token "
            "instead: correct, but slow.",
            stacklevel=5,
        )
