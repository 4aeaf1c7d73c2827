"""Tree-GRPO: leaves compared with the leaves of their tree, and with all leaves of their prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lit_agentrl.advantages import spread, total_rewards, tree_advantages, tree_ids
from lit_agentrl.errors import UserError
from lit_agentrl.methods.base import PolicyModule
from lit_agentrl.types import Advantages, Credit, Step, Trajectory, TrajectoryGroup


class TreeGRPOModule(PolicyModule):
    """Tree-GRPO (arXiv 2509.21240): A = intra_weight * A_intra + inter_weight * A_inter, on every token of a path.

    Both terms are the leaf's reward less the mean of its tree, or of its prompt, divided by the std there (Eq. 6-7).
    Every leaf is trained as a row of its own, so a step that n leaves share is pushed by all n, each with its own
    advantage, ratio and clipping. `docs/tree_grpo.md` holds formula against code.

    Args:
        intra_weight: Weight of the comparison within the tree.
        inter_weight: Weight of the comparison within the prompt; 1 with an `intra_weight` of 0 is GRPO on the leaves.
        scale: Divide deviations by the standard deviation (`std`), or not (`none`), in both terms.
        singleton: What a tree, or a prompt, of one leaf gets in its term: 0, or its raw reward as in the authors' code.
        credit: What a token of a step that n trained leaves share counts in each of their rows, in the surrogate, the
            KL and the entropy term, and in what the loss is divided by: 1 (`sum`, the authors' code), 1 / n (`mean`),
            or 1 / sqrt(n) (`sqrt`).
        **kwargs: See `PolicyModule`.
    """

    def __init__(
        self,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        scale: Literal["std", "none"] = "std",
        singleton: Literal["zero", "raw"] = "zero",
        credit: Credit = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, weight in (("intra_weight", intra_weight), ("inter_weight", inter_weight)):
            if not 0 <= weight < math.inf:
                raise UserError(f"{name}={weight}: must be 0 or more, and finite.")
        if intra_weight == inter_weight == 0:
            raise UserError("intra_weight=0 and inter_weight=0 leave nothing to learn from: set one of them above 0.")
        self.intra_weight, self.inter_weight = intra_weight, inter_weight
        self.scale, self.singleton, self.credit = scale, singleton, credit
        self.advantage_sums = statistics([])

    def advantages(self, group: TrajectoryGroup) -> Advantages:
        """One advantage per leaf, on all steps of its path."""
        rewards, trees = total_rewards(group), tree_ids(group)
        values = tree_advantages(
            rewards,
            trees,
            torch.zeros_like(trees),
            intra_weight=self.intra_weight,
            inter_weight=self.inter_weight,
            scale=self.scale,
            singleton=self.singleton,
        )
        return spread(values, group)

    def batch_advantages(self, groups: Sequence[TrajectoryGroup]) -> list[Advantages]:
        """The same for all groups; keeps what is logged of them."""
        self.advantage_sums = statistics(groups)
        return super().batch_advantages(groups)


def statistics(groups: Sequence[TrajectoryGroup]) -> dict[str, tuple[float, float]]:
    """Sums and counts of what Tree-GRPO logs: trees and prompts without a difference, their sizes, what is shared."""
    prompts = [group.trajectories for group in groups if group.trajectories]
    trees = [tree for leaves in prompts for tree in split_trees(leaves)]
    num_trees, num_leaves = float(len(trees)), float(sum(len(tree) for tree in trees))
    steps = [step for leaves in prompts for leaf in leaves for step in leaf.steps]
    sampled: dict[int, Step] = {id(step): step for step in steps}
    row_tokens, sampled_tokens = (float(sum(len(s.action_ids) for s in each)) for each in (steps, sampled.values()))
    return {
        "tree_grpo/flat_trees": (float(sum(_flat(tree) for tree in trees)), num_trees),
        "tree_grpo/flat_prompts": (float(sum(_flat(leaves) for leaves in prompts)), float(len(prompts))),
        "tree_grpo/lone_leaves": (float(sum(len(tree) == 1 for tree in trees)), num_leaves),
        "tree_grpo/leaves": (num_leaves, num_trees),
        "tree_grpo/shared_tokens": (row_tokens - sampled_tokens, row_tokens),
    }


def split_trees(leaves: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """The leaves of each tree, in the order in which the trees first appear."""
    trees: dict[int, list[Trajectory]] = {}
    for leaf in leaves:
        trees.setdefault(leaf.tree_id, []).append(leaf)
    return list(trees.values())


def _flat(leaves: Sequence[Trajectory]) -> bool:
    """Whether no leaf earned more than another."""
    return len({leaf.total_reward for leaf in leaves}) < 2
