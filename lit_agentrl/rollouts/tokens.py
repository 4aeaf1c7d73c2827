"""Views of a growing token list: what a step saw, without a copy of it for every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class TokenView(Sequence[int]):
    """The first `length` tokens of a list that is only ever appended to.

    The contexts of a branch extend one another, so one list holds them all: a branch of K steps costs its length once,
    not K times (at 20 steps of 4,000 tokens, 32 instead of 336 kB).

    Args:
        tokens: The list; its first `length` items never change.
        length: How many of them the view shows.
    """

    __slots__ = ("_length", "_tokens")

    def __init__(self, tokens: list[int], length: int) -> None:
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            # counting down to the first item, `indices` says stop = -1, which a list would take as its last
            return self._tokens[start : None if stop < 0 else stop : step]
        if not -self._length <= index < self._length:
            raise IndexError(f"token {index} of a view of {self._length}")
        return self._tokens[index + self._length if index < 0 else index]

    def __eq__(self, other: object) -> bool:
        """Whether `other` is a sequence of the same tokens."""
        if not isinstance(other, TokenView | list):
            return NotImplemented
        return self[:] == other[:]

    __hash__ = None  # type: ignore[assignment]  # compared by content, like a list

    def __repr__(self) -> str:
        return repr(self[:])
