"""What is asked for: goals of both kinds, their price limits, and the split of their ids."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from itertools import product as combinations

from lit_agentrl.envs.webshop.products import Product
from lit_agentrl.envs.webshop.sources import GoalKind
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

SHUFFLE_SEED = 233
"""The official site's; with its files, goal number i here is its session i."""
OFFICIAL_TEST, OFFICIAL_VAL = 500, 1000
ENOUGH = 2 * (OFFICIAL_TEST + OFFICIAL_VAL)
"""Goals from which on the official sizes are used: at least half of them train."""
PRICE_STEPS = tuple(10.0 * i for i in range(1, 100))


@dataclass(frozen=True, slots=True)
class Goal:
    """One instruction and what fulfils it."""

    product: Product
    """The product that it was made from; buying it with the right options scores 1."""
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    """(list, value) pairs; the list's name is empty where a person wrote the instruction."""
    price_upper: float
    """Dollars; infinite where the instruction names no limit."""


def num_goals(product: Product, kind: GoalKind) -> int:
    """How many goals ask for a product: one per combination of options, or one per person's instruction."""
    if kind == "human":
        return len(product.human)
    if not product.instruction or not product.instruction_attributes:
        return 0
    return math.prod(len(values) for _, values in product.options)


def make_goal(product: Product, kind: GoalKind, member: int) -> Goal:
    """The product's goal number `member`, in the order in which the official code lists them."""
    limit, price_text = _price_limit(product, kind, member)
    if kind == "human":
        said = product.human[member]
        options = tuple(("", value) for value in said.options)
        return Goal(product, said.text.strip(".") + price_text, said.attributes, options, limit)
    lists = sorted(product.options)
    values = next(islice(combinations(*(choices for _, choices in lists)), member, None))
    options = tuple((name, value) for (name, _), value in zip(lists, values, strict=True))
    wanted = ", and ".join(f"{name}: {value}" for name, value in options)
    text = f"{product.instruction}{' with ' + wanted if wanted else ''}{price_text}"
    return Goal(product, text, product.instruction_attributes, options, limit)


def _price_limit(product: Product, kind: GoalKind, member: int) -> tuple[float, str]:
    """The higher of two of the next four multiples of 10 dollars above the price, and how it is said.

    The official code draws anew in every process; here the goal fixes the draw.
    """
    price = product.price
    steps = [step for step in PRICE_STEPS if step > price][:4]
    if len(steps) < 2:
        return math.inf, ""
    upper = max(random.Random(f"webshop limit {kind} {product.asin} {member}").sample(steps, 2))
    return upper, f", and price lower than {upper:.2f} dollars"


class GoalTable:
    """All goals, shuffled once and split by number: test first, then val, the rest trains.

    Only numbers are held; goals are made when asked for.

    Args:
        counts: Goals of every product, in the order of the catalogue.
        num_test: Goals of the test split; None is the official 500, or a fifth of a small set.
        num_val: Goals of the val split; None is the official 1,000, or a tenth of a small set.

    Raises:
        UserError: There are no goals, or not enough for the splits asked for.
    """

    def __init__(self, counts: Sequence[int], num_test: int | None = None, num_val: int | None = None) -> None:
        self._ends = list(accumulate(counts))
        total = self._ends[-1] if self._ends else 0
        self.sizes = split_sizes(total, num_test, num_val)
        self._order = list(range(total))
        random.Random(SHUFFLE_SEED).shuffle(self._order)

    def __len__(self) -> int:
        """All goals."""
        return len(self._order)

    def numbers(self, split: Split) -> range:
        """The split's goals, as numbers in the shuffled order."""
        test, val = self.sizes["test"], self.sizes["test"] + self.sizes["val"]
        return {"test": range(test), "val": range(test, val), "train": range(val, len(self))}[split]

    def locate(self, number: int) -> tuple[int, int]:
        """The row of the goal's product, and which of the product's goals it is."""
        unshuffled = self._order[number]
        row = bisect_right(self._ends, unshuffled)
        return row, unshuffled - (self._ends[row - 1] if row else 0)


def split_sizes(total: int, num_test: int | None, num_val: int | None) -> dict[Split, int]:
    """How many goals each split has."""
    is_large = total >= ENOUGH
    test = num_test if num_test is not None else OFFICIAL_TEST if is_large else max(1, total // 5)
    val = num_val if num_val is not None else OFFICIAL_VAL if is_large else max(1, total // 10)
    if min(test, val) < 0 or test + val >= total:
        raise UserError(
            f"{total} goals cannot be split into {test} to test, {val} to validate and some to train. "
            "Lower num_test and num_val, or use more products."
        )
    return {"train": total - test - val, "val": val, "test": test}
