"""Planning the prefill: which prefixes several contexts share, and which rows to compute in one forward."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from lit_agentrl.rollouts.prefix_store import common_prefix, num_packed, truncate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lit_agentrl.rollouts.prefix_store import PrefixStore, RetainedRow

_MIN_SAVED = 32
"""Tokens that sharing a prefix must save: an extra forward costs about as much as this many tokens in a batch."""


def shared_prefixes(keys: Sequence[bytes], cached: Sequence[int]) -> list[list[tuple[bytes, range]]]:
    """Prefixes to compute once, with the contexts that begin with each, in waves: a wave extends the ones before it.

    Args:
        keys: Different contexts, sorted.
        cached: How many leading tokens of each are in the store already.
    """
    common = [common_prefix(left, right) for left, right in pairwise(keys)]
    waves: list[list[tuple[bytes, range]]] = []
    pending = [(range(len(keys)), 0, 0)]
    while pending:
        members, depth, wave = pending.pop()
        if len(members) < 2:
            continue
        inner = common[members[0] : members[-1]]
        split = min(inner)
        # a context that is itself the prefix computes its last token alone, for its logits: once, not twice
        length = min(split, num_packed(keys[members[0]]) - 1)
        # what the store holds of any member it holds of all, up to the prefix they share
        known = max(depth, min(length, max(cached[members[0] : members[-1] + 1])))
        if (len(members) - 1) * (length - known) >= _MIN_SAVED:
            waves.extend([] for _ in range(wave + 1 - len(waves)))
            waves[wave].append((truncate(keys[members[0]], length), members))
            depth, wave = length, wave + 1
        cuts = [members[0] + 1 + i for i, shared in enumerate(inner) if shared == split]
        bounds = [members[0], *cuts, members[-1] + 1]
        pending.extend((range(a, b), depth, wave) for a, b in pairwise(bounds))
    return waves


@dataclass(slots=True)
class PrefillRow:
    """A token sequence to bring into a row of keys and values."""

    key: bytes
    index: int
    """Its place in the caller's order."""
    source: RetainedRow | None
    """The retained row that has its first tokens, if any."""
    num_cached: int

    @property
    def num_new(self) -> int:
        """Tokens to compute."""
        return num_packed(self.key) - self.num_cached

    def columns(self, end: int, width: int) -> NDArray[np.int64]:
        """The column of each token: new ones right-aligned at `end`, cached ones `width` columns before it."""
        first_new = end - width
        return np.concatenate(
            [np.arange(first_new - self.num_cached, first_new), np.arange(end - self.num_new, end)]
        ).astype(np.int64)


@dataclass(slots=True)
class PrefillPlan:
    """Rows in the order of the buffer, in chunks of one forward each; every row ends at column `end`."""

    rows: list[PrefillRow]
    chunks: list[slice]
    end: int

    def width(self, chunk: slice) -> int:
        """New columns of a chunk: its longest row's."""
        return max(row.num_new for row in self.rows[chunk])


def plan_prefill(keys: Sequence[bytes], store: PrefixStore, max_tokens: int) -> PrefillPlan:
    """Look every sequence up in the store, and batch rows with similar numbers of new tokens.

    At least the last token of a row is computed: its logits are what the caller is after.
    """
    rows = []
    for index, key in enumerate(keys):
        source, length = store.longest_prefix(key)
        num_cached = min(length, num_packed(key) - 1)
        rows.append(PrefillRow(key, index, source if num_cached else None, num_cached))
    # rows from the same place stay together, so that one copy serves all
    rows.sort(key=lambda row: (row.num_new, row.num_cached, id(row.source)))
    chunks, first, num_new = [], 0, 0
    for i, row in enumerate(rows):
        padded = (i + 1 - first) * row.num_new  # rows are sorted: this one is the widest of its chunk
        is_full = padded > max_tokens or padded - (num_new + row.num_new) > max(_MIN_SAVED, padded // 8)
        if is_full and i > first:
            chunks.append(slice(first, i))
            first, num_new = i, 0
        num_new += row.num_new
    chunks.append(slice(first, len(rows)))
    plan = PrefillPlan(rows, chunks, 0)
    plan.end = max(plan.width(chunk) + max(row.num_cached for row in rows[chunk]) for chunk in chunks)
    return plan
