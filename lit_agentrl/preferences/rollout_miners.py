"""Miners that compare actions by what was earned after them."""

from __future__ import annotations

from collections.abc import Sequence

from lit_agentrl.anchors import AnchorKind
from lit_agentrl.errors import UserError
from lit_agentrl.preferences.anchor_actions import anchor_actions
from lit_agentrl.preferences.candidates import Candidate
from lit_agentrl.preferences.siblings import tree_siblings
from lit_agentrl.preferences.source import Miner, MiningSource
from lit_agentrl.rollouts.base import Prompt


class TreeSiblings(Miner):
    """Actions taken after the same steps, by the mean reward of the episodes below them.

    With `TreeRollout` at every node where branches part; with chains at the first step alone.

    Args:
        pairs_per_node: The best action is paired with at most so many others, the worst first.
        across_trees: Let the first actions of all trees of a prompt compete, as they answer the same prompt.
    """

    mode = "tree_siblings"

    def __init__(self, pairs_per_node: int = 1, across_trees: bool = True) -> None:
        check_count("pairs_per_node", pairs_per_node)
        self.pairs_per_node, self.across_trees = pairs_per_node, across_trees

    def check(self, source: MiningSource) -> None:
        """A prompt needs two trajectories to compare."""
        check_group(source)

    def mine(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        """See `siblings.tree_siblings`."""
        groups = source.play(prompts)
        return [tree_siblings(g, source.chat_mode, self.pairs_per_node, self.across_trees) for g in groups]


class AnchorActions(Miner):
    """Actions taken in the same state, by their mean discounted return: GiGPO's step level as preferences.

    Args:
        gamma: Discount of the returns.
        anchor: What makes two states the same (see `lit_agentrl.anchors.anchor_keys`).
        history: Pairs of `anchor: text_history`.
        pairs_per_state: The best action is paired with at most so many others, the worst first.
        same_prompt: Leave out actions that were taken after another history, so answered another prompt.
    """

    mode = "anchor_actions"

    def __init__(
        self,
        gamma: float = 0.95,
        anchor: AnchorKind = "text",
        history: int = 2,
        pairs_per_state: int = 1,
        same_prompt: bool = False,
    ) -> None:
        if not 0 <= gamma <= 1:
            raise UserError(f"gamma={gamma}: a discount lies in [0, 1].")
        if history < 0:
            raise UserError(f"history={history}: must be 0 pairs or more.")
        check_count("pairs_per_state", pairs_per_state)
        self.gamma, self.anchor, self.history = gamma, anchor, history
        self.pairs_per_state, self.same_prompt = pairs_per_state, same_prompt

    def check(self, source: MiningSource) -> None:
        """A prompt needs two trajectories to compare."""
        check_group(source)

    def mine(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        """See `anchor_actions.anchor_actions`."""
        return [
            anchor_actions(
                group,
                source.chat_mode,
                self.gamma,
                self.anchor,
                self.history,
                self.pairs_per_state,
                self.same_prompt,
            )
            for group in source.play(prompts)
        ]


def check_count(name: str, value: int) -> None:
    """Refuse what is no number of things.

    Raises:
        UserError: It is below 1.
    """
    if value < 1:
        raise UserError(f"{name}={value}: must be at least 1.")


def check_group(source: MiningSource) -> None:
    """Refuse groups of one.

    Raises:
        UserError: There is nothing to compare.
    """
    if source.group_size < 2:
        raise UserError(f"data.group_size={source.group_size}: pairs need at least 2 trajectories of a prompt.")
