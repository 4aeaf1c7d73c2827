"""Which token prefixes have keys and values already: a bounded store of rows, searched by longest common prefix."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from lit_agentrl.rollouts.kv_cache import KVRows

_WIDTH = 4


def pack(token_ids: Sequence[int]) -> bytes:
    """Tokens as bytes that compare as the token sequences do (big-endian, 4 bytes each)."""
    return np.asarray(token_ids, dtype=">u4").tobytes()


def unpack(key: bytes) -> NDArray[np.int64]:
    """The tokens of `key`."""
    return np.frombuffer(key, ">u4").astype(np.int64)


def num_packed(key: bytes) -> int:
    """How many tokens `key` holds."""
    return len(key) // _WIDTH


def truncate(key: bytes, num_tokens: int) -> bytes:
    """The first tokens of `key`."""
    return key[: num_tokens * _WIDTH]


def common_prefix(left: bytes, right: bytes) -> int:
    """Length of the longest common prefix, in tokens."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size // _WIDTH
    differs = np.frombuffer(left, "u4", size // _WIDTH) != np.frombuffer(right, "u4", size // _WIDTH)
    return int(differs.argmax())


@dataclass(slots=True, frozen=True)
class RetainedRow:
    """Keys and values of one token sequence."""

    key: bytes
    """The packed tokens, L of them."""
    kv: KVRows
    row: int
    columns: NDArray[np.int64]
    """[L], the column of each token."""


class PrefixStore:
    """Retained rows in token order. A row that another one begins with is dropped; the oldest buffers go first."""

    def __init__(self, max_tokens: int) -> None:
        """Keep at most `max_tokens` columns (after `evict`)."""
        self.max_tokens = max_tokens
        self._rows: list[RetainedRow] = []
        self._buffers: dict[int, KVRows] = {}  # by id, least recently used first

    @property
    def num_tokens(self) -> int:
        """Columns of every retained buffer, used or not."""
        return sum(kv.num_tokens for kv in self._buffers.values())

    def __len__(self) -> int:
        return len(self._rows)

    def longest_prefix(self, key: bytes) -> tuple[RetainedRow | None, int]:
        """The row that shares the most tokens with the start of `key`, and how many; (None, 0) where none does."""
        best, length = None, 0
        # in sorted order nothing shares more with `key` than one of its two neighbours
        index = bisect_left(self._rows, key, key=lambda row: row.key)
        for row in self._rows[max(index - 1, 0) : index + 1]:
            shared = common_prefix(row.key, key)
            if shared > length:
                best, length = row, shared
        if best is not None:
            self._buffers[id(best.kv)] = self._buffers.pop(id(best.kv))  # now the most recently used
        return best, length

    def add(self, rows: Iterable[RetainedRow]) -> None:
        """Retain `rows`. Nothing is evicted yet: a call may need everything it has computed so far."""
        candidates = sorted([*self._rows, *rows], key=lambda row: row.key)
        # a prefix of any row is a prefix of the row right after it; of equal rows the last, the newest, stays
        self._rows = [
            row
            for row, after in zip(candidates, [*candidates[1:], None], strict=True)
            if after is None or not after.key.startswith(row.key)
        ]
        buffers = {id(row.kv): row.kv for row in self._rows}
        kept = {name: kv for name, kv in self._buffers.items() if name in buffers}
        self._buffers = kept | buffers

    def evict(self) -> None:
        """Drop the least recently used buffers until the bound holds."""
        excess = self.num_tokens - self.max_tokens
        for name in list(self._buffers):
            if excess <= 0:
                break
            excess -= self._buffers.pop(name).num_tokens
        self._rows = [row for row in self._rows if id(row.kv) in self._buffers]

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._rows.clear()
        self._buffers.clear()
