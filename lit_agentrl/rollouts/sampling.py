"""From logits to sampled tokens and their log-probabilities, one row at a time whatever the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from lit_agentrl.rollouts.engine import NonFiniteLogitsError, uniforms

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from lit_agentrl.rollouts.stop_strings import StopStrings
    from lit_agentrl.types import SamplingParams

_BLOCK = 256


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row at which the cumulative weight reaches `uniforms` of the total, [B] int64.

    Cumulative sums are float64: in float32 the rounding of a 50,000-token sum would starve rare tokens. Two levels
    (blocks, then inside one block) read the weights once and never write them in float64; a float32 sum of one block
    is off by 1e-7 of it, less than the logits are.

    Args:
        weights: [B, V], non-negative, not all 0 in a row; they need not sum to 1.
        uniforms: [B] float64 in (0, 1).
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    mass = blocks.sum(-1).double().cumsum(-1)
    target = (uniforms * mass[:, -1])[:, None]
    block = torch.searchsorted(mass, target).clamp_(max=mass.shape[-1] - 1)  # NaN weights point beyond the last block
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    before = F.pad(mass, (1, 0)).gather(1, block)
    # the two ways of summing a block differ in the last bits: never look beyond the block's own last token
    rest = torch.minimum(target - before, inside[:, -1:])
    tokens: Tensor = (block * _BLOCK + torch.searchsorted(inside, rest))[:, 0]
    return tokens.clamp_(max=weights.shape[-1] - 1)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` [B, V], -inf outside the `top_k` best and then outside the smallest set with mass `top_p`."""
    if 0 < top_k < logits.shape[-1]:
        weakest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if top_p < 1:
        ordered, tokens = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1, dtype=torch.float64)
        is_outside = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses `top_p` stays in
        logits = logits.masked_fill(is_outside.scatter(1, tokens, is_outside), float("-inf"))
    return logits


def sample_tokens(
    logits: Tensor, params: SamplingParams, uniforms: Tensor, excluded: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Sampled tokens [B] int64 and their log-probabilities [B] float32, NaN where the logits are not finite.

    The log-probability is log_softmax(logits / temperature) over the whole vocabulary (at temperature 1 for greedy):
    what a trainer computes. `top_k`, `top_p` and `excluded` only restrict what is drawn, they do not renormalise it.

    Args:
        logits: [B, V] of the next token.
        params: Temperature, `top_k` and `top_p`.
        uniforms: [B] float64 in (0, 1); unused for greedy.
        excluded: Tokens that are never drawn.
    """
    logits = logits.float()
    if params.temperature not in (0, 1):
        logits = logits / params.temperature
    log_total = log_allowed = logits.logsumexp(-1, keepdim=True)
    allowed = logits
    if excluded:
        allowed = logits.index_fill(-1, torch.tensor(excluded, device=logits.device), float("-inf"))
        log_allowed = allowed.logsumexp(-1, keepdim=True)  # else nearly all mass on excluded tokens would underflow
    if params.temperature > 0:
        tokens = inverse_cdf((restrict(allowed, params.top_k, params.top_p) - log_allowed).exp_(), uniforms)
    else:
        tokens = allowed.argmax(-1)
    logprobs = (logits.gather(1, tokens[:, None]) - log_total)[:, 0]
    return tokens, logprobs.where(log_total[:, 0].isfinite(), float("nan"))


class Actions:
    """The actions of B sequences while they grow: tokens, log-probabilities and how each ended."""

    def __init__(
        self,
        params: SamplingParams,
        seeds: Sequence[int],
        stop_ids: Collection[int],
        *,
        stop_strings: StopStrings | None = None,
        excluded: Sequence[int] = (),
        weights: str = "the weights",
    ) -> None:
        """Start with B empty actions.

        Args:
            params: How to sample.
            seeds: [B], one seed per sequence.
            stop_ids: Tokens that end an action.
            stop_strings: Texts that do; None where there are none.
            excluded: Tokens that are never drawn.
            weights: What to call the weights when their logits are not finite.
        """
        self.token_ids: list[list[int]] = [[] for _ in seeds]
        self.logprobs: list[list[float]] = [[] for _ in seeds]
        self._params = params
        self._uniforms = torch.from_numpy(uniforms(seeds, params.max_new_tokens))
        self._stop_ids = frozenset(stop_ids)
        self._stop_strings = stop_strings
        self._excluded = excluded
        self._has_stopped = [False] * len(self.token_ids)
        self._weights = weights

    def extend(self, logits: Tensor, sequences: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Sample one token for each of `sequences`: the tokens [n] and whether each action is now complete.

        Raises:
            NonFiniteLogitsError: If a row of `logits` [n, V] has a NaN, +inf, or nothing but -inf.
        """
        positions = [len(self.token_ids[sequence]) for sequence in sequences]
        drawn = self._uniforms[list(sequences), positions].to(logits.device)
        tokens, logprobs = sample_tokens(logits, self._params, drawn, self._excluded)
        is_complete = []
        for sequence, token, logprob in zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True):
            if logprob != logprob:
                raise NonFiniteLogitsError(
                    f"The model's logits are not finite ({self._weights}; sequence {sequence}, "
                    f"new token {len(self.token_ids[sequence])}): its weights have diverged or overflow their dtype. "
                    "Go back to an earlier checkpoint and lower the learning rate, or use float32 or bfloat16."
                )
            self.token_ids[sequence].append(token)
            self.logprobs[sequence].append(logprob)
            self._has_stopped[sequence] = self._stops(self.token_ids[sequence])
            is_full = len(self.token_ids[sequence]) == self._params.max_new_tokens
            is_complete.append(self._has_stopped[sequence] or is_full)
        return tokens, is_complete

    def _stops(self, token_ids: list[int]) -> bool:
        """Whether an action ends by itself with the token that it got last."""
        if token_ids[-1] in self._stop_ids:
            return True
        return self._stop_strings is not None and self._stop_strings.is_complete(token_ids)

    def finish(self, sequence: int) -> Literal["stop", "length"]:
        """How the action ended."""
        return "stop" if self._has_stopped[sequence] else "length"
