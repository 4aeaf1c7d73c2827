"""The row of a key, looked up on disk: 16 bytes a key whatever its length, shared by all processes that map them.

A dictionary of the words or ids of a large corpus would take gigabytes in every worker.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def hashed(key: str) -> int:
    """64 bits of a key's BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class KeyTable:
    """The saved rows of keys.

    Two of a million keys share their hash with a chance of 1 in 37 million, so whoever cannot bear that looks at what
    the rows hold.

    Args:
        folder: Where `write` put it.
        name: The name it was written under.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.hashes = np.load(folder / f"{name}_hashes.npy", mmap_mode="r")
        """[N] the hash of each row's key."""
        self._order = np.load(folder / f"{name}_order.npy", mmap_mode="r")

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.hashes)

    def rows(self, key: str) -> list[int]:
        """The rows whose key has this key's hash: none, or one."""
        wanted = np.uint64(hashed(key))
        first = int(np.searchsorted(self.hashes, wanted, side="left", sorter=self._order))
        last = int(np.searchsorted(self.hashes, wanted, side="right", sorter=self._order))
        rows: list[int] = self._order[first:last].tolist()
        return rows

    @staticmethod
    def write(hashes: array[int], folder: Path, name: str) -> list[list[int]]:
        """Save the table of these hashes, row by row; gives the rows that share one, in groups."""
        column = np.frombuffer(hashes, dtype=np.uint64)
        order = np.argsort(column, kind="stable")
        np.save(folder / f"{name}_hashes.npy", column)
        np.save(folder / f"{name}_order.npy", order)
        ordered = column[order]
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        spans = zip(np.searchsorted(ordered, repeated), np.searchsorted(ordered, repeated, "right"), strict=True)
        return [order[first:last].tolist() for first, last in spans]


def hash_all(keys: Iterable[str]) -> array[int]:
    """The hashes of the keys, 8 bytes each."""
    return array("Q", map(hashed, keys))
