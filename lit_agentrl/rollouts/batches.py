"""Which contexts are decoded together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def batches(
    contexts: Sequence[list[int]], indices: Iterable[int], max_new_tokens: int, *, max_size: int, max_tokens: int
) -> list[list[int]]:
    """`indices` of contexts in batches within the limits; equal contexts and similar lengths stay together.

    Args:
        contexts: Token ids.
        indices: Which of them.
        max_new_tokens: How far each may grow.
        max_size: Most contexts of a batch.
        max_tokens: Most tokens of a batch, contexts and actions; a single longer context is a batch of its own.
    """
    found: list[list[int]] = []
    current: list[int] = []
    for index in sorted(indices, key=lambda i: (len(contexts[i]), contexts[i])):
        # sorted by length: this context is the longest so far, and every row of a batch is as wide as its longest
        num_tokens = (len(current) + 1) * (len(contexts[index]) + max_new_tokens)
        if current and (len(current) == max_size or num_tokens > max_tokens):
            found.append(current)
            current = []
        current.append(index)
    # in a batch the call's order again: a shared prefix counts for the first context that has it
    return [sorted(batch) for batch in ([*found, current] if current else found)]
