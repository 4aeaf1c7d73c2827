"""One manager of transformers' continuous batching, and the requests of one call at a time through it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.seeded_sampler import SeededSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

    from lit_agentrl.rollouts.stop_strings import StopStrings
    from lit_agentrl.types import SamplingParams

_OWN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_KEPT = "_cached_continuous_batching_manager"
"""Where transformers leaves a manager on the model between calls."""


@dataclass(frozen=True)
class PagedLimits:
    """What a paged cache may take."""

    max_requests: int
    """Sequences decoded together."""
    max_batch_tokens: int
    """Tokens of one forward."""
    max_cached_tokens: int
    """Tokens whose keys and values have room, rounded up to pages; taken at once."""
    page_size: int
    share_prefixes: bool
    use_cuda_graphs: bool | None

    def config(self) -> ContinuousBatchingConfig:
        """For transformers."""
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        options: dict[str, Any] = {
            "page_size" if "page_size" in names else "block_size": self.page_size,  # renamed in 5.17
            "num_blocks": -(-self.max_cached_tokens // self.page_size),
            "max_batch_tokens": self.max_batch_tokens,
            "max_requests_per_batch": self.max_requests,
            "allow_block_sharing": self.share_prefixes,
            "use_cuda_graph": self.use_cuda_graphs,
            "return_logprobs": True,  # makes room for them; the sampler writes them
            "seed": 0,  # of its own sampling, which is not used
        }
        return ContinuousBatchingConfig(**options)


@dataclass(slots=True)
class PagedAction:
    """What came of one request."""

    token_ids: list[int]
    logprobs: list[float]
    num_cached: int


class PagedSession:
    """Continuous batching of one model with one way to sample; holds the paged cache until `close`.

    The loop runs in a thread while a call does, and the model is between calls as it was before: its attention, its
    attributes, so that it can be copied, and the random state.

    Args:
        lm: Generates; its weights may change in place between sessions, not within one (its keys and values stay).
        params: How to sample; `max_new_tokens` and what stops are of the call.
        limits: Of the cache and the batches.

    Raises:
        UserError: If the model or the memory does not allow it.
    """

    def __init__(self, lm: PreTrainedModel, params: SamplingParams, limits: PagedLimits) -> None:
        self._lm = lm
        self._sampler = SeededSampler(params)
        self._num_requests = 0
        with paged_attention(lm), own_random_state(lm.device):
            try:
                config = GenerationConfig(do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
                self._manager = cast("ContinuousMixin", lm).init_continuous_batching(config, limits.config())
                self._manager.logit_processor = self._sampler
                processor = self._manager._create_batch_processor()
                processor.model_runner._sample = self._sampler.write  # type: ignore[method-assign]
                self._manager.batch_processor = processor
            except (
                ValueError,
                KeyError,
                AttributeError,
                NotImplementedError,
                MemoryError,
                torch.OutOfMemoryError,
            ) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"ContinuousBatchingEngine cannot run {type(lm).__name__} with {limits}: {type(error).__name__}: "
                    f"{reason}. Lower max_cached_tokens or max_batch_tokens, or use HFEngine."
                ) from error

    def run(
        self,
        contexts: Sequence[Sequence[int]],
        uniforms: Tensor,
        stop_ids: Sequence[int],
        stop_strings: StopStrings | None = None,
    ) -> list[PagedAction]:
        """One action per context, with `uniforms` [B, max_new_tokens] float64.

        Raises:
            RuntimeError: If the loop or one of the requests failed.
        """
        names = [f"action_{self._num_requests + index}" for index in range(len(contexts))]
        self._num_requests += len(contexts)
        for name, context, numbers in zip(names, contexts, uniforms, strict=True):
            self._sampler.add(name, len(context), numbers)
        with paged_attention(self._lm), self._started() as manager:
            # equal prefixes side by side: whole pages of them are computed once
            for index in sorted(range(len(names)), key=lambda index: list(contexts[index])):
                manager.add_request(
                    list(contexts[index]),
                    names[index],
                    max_new_tokens=uniforms.shape[1],
                    streaming=stop_strings is not None,
                    eos_token_id=list(stop_ids),
                )
            done = _collect(manager, names, stop_strings)
        return [PagedAction(*done[name], self._sampler.pop(name)) for name in names]

    @contextmanager
    def _started(self) -> Iterator[ContinuousBatchingManager]:
        """The manager with its loop running; on leaving it has ended, at once where something was raised."""
        self._lm.__dict__[_KEPT] = self._manager
        manager = cast("ContinuousMixin", self._lm).init_continuous_batching()  # sets the attention again
        is_whole = False
        try:
            manager.start()
            yield manager
            is_whole = True
        finally:
            try:
                manager.stop(keep_for_next_session=True, hard_stop=not is_whole)
            finally:
                self._lm.__dict__.pop(_KEPT, None)  # it holds locks: nobody could copy the model

    def close(self) -> None:
        """Give the cache back."""
        self._manager.destroy()
        self._manager.batch_processor = None


def _collect(
    manager: ContinuousBatchingManager, names: Sequence[str], stop_strings: StopStrings | None
) -> dict[str, tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of every request; those that a stop string ends are cancelled there."""
    done: dict[str, tuple[list[int], list[float]]] = {}
    num_read = dict.fromkeys(names, 0)
    while len(done) < len(names):
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("The loop of continuous batching has ended before its requests; its log says why.")
            continue
        name, tokens = output.request_id, output.generated_tokens
        if name not in num_read or name in done:
            continue  # a token that was on its way when its request was cancelled
        if output.error is not None:
            raise RuntimeError(f"Continuous batching failed: {output.error}")
        end = len(tokens) if output.is_finished() else None
        if stop_strings is not None:
            for length in range(num_read[name] + 1, len(tokens) + 1):
                if stop_strings.is_complete(tokens[:length]):
                    end = length
                    manager.cancel_request(name)
                    break
            num_read[name] = len(tokens)
        if end is not None:
            done[name] = tokens[:end], output.logprobs[:end]
    return done


@contextmanager
def paged_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, an attention that continuous batching can replace; restored afterwards whatever it was replaced by."""
    own = lm.config._attn_implementation
    try:
        if own not in _OWN_ATTENTION:
            lm.set_attn_implementation("sdpa")
        yield
    finally:
        if lm.config._attn_implementation != own:
            lm.set_attn_implementation(own)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Nothing inside moves the caller's random state: transformers seeds all of it when it makes a cache."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
