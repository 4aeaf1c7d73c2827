"""Which nodes of a tree to expand: small policies behind one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.forest import Node


class Expansion(ABC):
    """Chooses where new branches of a tree begin."""

    @abstractmethod
    def pick(self, candidates: Sequence[Node], num: int, generator: np.random.Generator) -> list[Node]:
        """`num` nodes, the same one more than once where it is to get more branches.

        Args:
            candidates: The root, then every node that another step followed, level by level; never empty.
            num: How many.
            generator: All randomness comes from it.
        """


class Uniform(Expansion):
    """Every candidate alike, with replacement: the paper's (arXiv 2509.21240) and its code's.

    A chain of T steps offers T places, so a given early state is picked the less often the longer its episode
    turned out to be.
    """

    def pick(self, candidates: Sequence[Node], num: int, generator: np.random.Generator) -> list[Node]:
        """`num` draws."""
        return [candidates[i] for i in generator.integers(len(candidates), size=num)]


class PerDepth(Expansion):
    """A depth uniformly among those there are, then a node of that depth: early states are not out-numbered."""

    def pick(self, candidates: Sequence[Node], num: int, generator: np.random.Generator) -> list[Node]:
        """`num` draws of a depth and a node."""
        levels: dict[int, list[Node]] = {}
        for node in candidates:
            levels.setdefault(node.depth, []).append(node)
        depths = list(levels)
        drawn = [levels[depths[i]] for i in generator.integers(len(depths), size=num)]
        return [level[generator.integers(len(level))] for level in drawn]


class WithoutReplacement(Expansion):
    """Every candidate once, in random order, before any a second time."""

    def pick(self, candidates: Sequence[Node], num: int, generator: np.random.Generator) -> list[Node]:
        """`num` nodes, all different where there are as many."""
        order: list[int] = []
        while len(order) < num:
            order += generator.permutation(len(candidates)).tolist()
        return [candidates[i] for i in order[:num]]


class Entropy(Expansion):
    """In proportion to the policy's uncertainty at the node: the mean of -log p over the tokens it went on with.

    Args:
        power: 0 is uniform; above 1 the most uncertain nodes get most branches.

    Raises:
        UserError: `power` is negative.
    """

    def __init__(self, power: float = 1.0) -> None:
        if power < 0:
            raise UserError(f"power={power}: must be 0 or more.")
        self.power = power

    def pick(self, candidates: Sequence[Node], num: int, generator: np.random.Generator) -> list[Node]:
        """`num` draws with replacement."""
        return weighted([max(0.0, node.surprisal) ** self.power for node in candidates], candidates, num, generator)


class ValueVariance(Expansion):
    """In proportion to how much the returns below a node differ, so where the choice of the next step matters.

    The variance of a node's n returns is taken together with one observation of the tree's, v = (S_node + s_tree) /
    (n + 1) with S_node the sum of squared deviations and s_tree the tree's variance: a node that was seen once is
    unknown, not certain. Before any return differs all candidates are alike, so it needs `rounds` of 2 or more to
    have an effect.
    """

    def pick(self, candidates: Sequence[Node], num: int, generator: np.random.Generator) -> list[Node]:
        """`num` draws with replacement."""
        tree = float(np.var(candidates[0].returns)) if candidates[0].returns else 0.0
        weights = []
        for node in candidates:
            returns = np.array(node.returns)
            spread = float(((returns - returns.mean()) ** 2).sum()) if len(returns) else 0.0
            weights.append((spread + tree) / (len(returns) + 1))
        return weighted(weights, candidates, num, generator)


def weighted(
    weights: Sequence[float], candidates: Sequence[Node], num: int, generator: np.random.Generator
) -> list[Node]:
    """`num` draws in proportion to `weights`, with replacement; uniform where all weights are 0."""
    total = sum(weights)
    chances = [weight / total for weight in weights] if total > 0 else None
    return [candidates[i] for i in generator.choice(len(candidates), size=num, p=chances)]
