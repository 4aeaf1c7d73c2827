"""Sampling inside transformers' continuous batching as `HFEngine` samples: a seed a request, unrenormalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.logits_process import LogitsProcessorList

from lit_agentrl.rollouts.sampling import sample_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.continuous_batching.requests import FutureRequestState

    from lit_agentrl.types import SamplingParams


@dataclass(slots=True)
class _Request:
    """What one request draws its tokens with."""

    num_context: int
    uniforms: Tensor
    """[N] float64: number n draws new token n."""
    num_cached: int | None = None
    """Context tokens whose keys and values were there when it was first scheduled; None before that."""


class SeededSampler(ContinuousBatchingLogitsProcessorList):
    """Stands where continuous batching has its logits processors, and draws the tokens there.

    Its own sampling takes all requests' randomness from one generator, so that a token would depend on what it is
    batched with, and reports log-probabilities renormalised to top-k and top-p. Here the number that draws a token goes
    to the device with the batch (two int32 rows that hold one float64), so that a captured CUDA graph reads new ones at
    every replay.

    Args:
        params: How to sample; a captured graph keeps them, so they hold for the sampler's life.
    """

    def __init__(self, params: SamplingParams) -> None:
        super().__init__(LogitsProcessorList())
        self.tensors_required = 2
        self.do_processing = True
        self._params = params
        self._requests: dict[str, _Request] = {}
        self._drawn: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, num_context: int, uniforms: Tensor) -> None:
        """Draw new token n of request `name` with `uniforms[n]`, [N] float64."""
        self._requests[name] = _Request(num_context, uniforms)

    def pop(self, name: str) -> int:
        """Forget a request; how many tokens of its context were not computed for it."""
        return self._requests.pop(name).num_cached or 0

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill [2, 1] with what rows that belong to no request draw with."""
        half = torch.tensor([0.5], dtype=torch.float64).view(torch.int32)
        int32_tensor.copy_(half[:, None])

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor) -> Tensor:
        """Write the numbers of the requests that get a token into `arg_storage` [2, R], in their order."""
        numbers = []
        for scheduled in requests_in_batch:
            state = scheduled.state
            request = self._requests.get(state.request_id)
            if request is None:  # one of those that warm up
                position, uniforms = 0, torch.full((1,), 0.5, dtype=torch.float64)
            else:
                if request.num_cached is None:
                    request.num_cached = state.position_offset - scheduled.query_length
                # A position, and not a count of tokens: an evicted request comes back with a longer context, and an
                # asynchronous loop prepares a step before it has seen the last one's token.
                position, uniforms = state.position_offset - request.num_context, request.uniforms
            if scheduled.has_new_token:
                numbers.append(uniforms[min(position, len(uniforms) - 1)])  # the loop may run a step past the end
        if numbers:
            drawn = torch.stack(numbers).view(torch.int32).view(-1, 2).T
            arg_storage[:, : len(numbers)] = drawn.to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Draw a token for every row of `scores` [R, V], which go on unchanged; `write` hands the tokens over."""
        numbers = logits_processor_args[:, : len(scores)].T.contiguous().view(torch.float64)[:, 0]
        self._drawn = sample_tokens(scores, self._params, numbers)
        return scores

    def write(self, scores: Tensor, output_ids: Tensor) -> None:
        """Stands where continuous batching samples: tokens and bits of log-probabilities into `output_ids` [2, N]."""
        assert self._drawn is not None  # called right after `__call__`
        tokens, logprobs = self._drawn
        output_ids[0, : len(tokens)].copy_(tokens)
        output_ids[1, : len(tokens)].copy_(logprobs.view(torch.int32))
