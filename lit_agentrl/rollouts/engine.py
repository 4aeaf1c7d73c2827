"""What every engine shares: where its randomness comes from, and which requests and weights it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lit_agentrl.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lit_agentrl.types import SamplingParams


class NonFiniteLogitsError(RuntimeError):
    """The weights gave NaN or infinite logits, so there is nothing to sample from."""


def rollout_seed(seed: int, iteration: int, prompt: int | str, trajectory: int, turn: int) -> int:
    """The seed of one action, the same in every process and on every platform, in [0, 2^63).

    63 bits, so that it also fits the signed integers of a tensor.
    """
    # the type is part of the text: prompt 7 and prompt "7" are two prompts
    parts = (f"{type(part).__name__}:{len(str(part))}:{part}" for part in (seed, iteration, prompt, trajectory, turn))
    digest = hashlib.blake2b("|".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seeds: Sequence[int], num_positions: int) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), [B, N] float64: number n of row b depends on `seeds[b]` and n alone.

    Philox is counter-based and its stream is fixed by numpy's compatibility policy, so asking for more positions
    only appends numbers.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed % 2**64)).random(num_positions) for seed in seeds]
    drawn = np.stack(rows) if rows else np.empty((0, num_positions))
    return np.maximum(drawn, 2.0**-54)  # 0 would select the first token even where its probability is 0


def check_params(params: SamplingParams) -> None:
    """Refuse sampling parameters that mean nothing.

    Raises:
        UserError: If one of them is out of its range.
    """
    allowed = {
        "max_new_tokens": (params.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= params.temperature < float("inf"), "0 (greedy) or a positive number"),
        "top_p": (0 < params.top_p <= 1, "in (0, 1]; 1 keeps every token"),
        "top_k": (params.top_k >= 0, "0 (no limit) or a positive count"),
    }
    for name, (is_valid, text) in allowed.items():
        if not is_valid:
            raise UserError(f"{name}={getattr(params, name)}: allowed is {text}.")
    check_stop(params.stop)


def check_stop(texts: Sequence[str]) -> None:
    """Refuse stop strings that every action, or one with half a character in it, would hold.

    Raises:
        UserError: If a text is empty or has the replacement character in it.
    """
    for text in texts:
        if not text or "\ufffd" in text:
            raise UserError(
                f"stop={tuple(texts)!r}: {text!r} cannot end an action. Give texts of one or more characters, the "
                "replacement character U+FFFD not among them."
            )


def check_contexts(
    contexts: Sequence[Sequence[int]], max_new_tokens: int, *, vocab_size: int, max_length: int | None
) -> None:
    """Refuse contexts that the model cannot continue.

    Raises:
        UserError: If a context is empty, holds an id outside the vocabulary, or leaves no room for the action.
    """
    for index, context in enumerate(contexts):
        if not context:
            raise UserError(
                f"Context {index} of {len(contexts)} is empty: an action needs at least one token before it."
            )
        low, high = min(context), max(context)
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"Context {index} holds token id {low if low < 0 else high}, but the model has {vocab_size} tokens: "
                "the tokenizer belongs to another model."
            )
        if max_length is not None and len(context) + max_new_tokens > max_length:
            raise UserError(
                f"Context {index} has {len(context)} tokens and max_new_tokens={max_new_tokens}, together "
                f"{len(context) + max_new_tokens}, but the model has only {max_length} positions "
                "(max_position_embeddings). Shorten the prompt or lower max_new_tokens."
            )
