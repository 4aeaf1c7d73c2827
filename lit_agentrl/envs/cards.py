"""Playing cards: what they are called and count. Suits do not matter in any game here."""

from __future__ import annotations

import random

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")


def draw_rank(rng: random.Random) -> str:
    """A card of an endless deck."""
    return rng.choice(RANKS)


def value(rank: str, faces_as_ten: bool = True) -> int:
    """What a card counts: an ace 1, J, Q and K 10, or else 11, 12 and 13."""
    number = RANKS.index(rank) + 1
    return min(number, 10) if faces_as_ten else number


def ranks_of(number: int, faces_as_ten: bool = True) -> list[str]:
    """The cards that count `number`."""
    return [rank for rank in RANKS if value(rank, faces_as_ten) == number]
