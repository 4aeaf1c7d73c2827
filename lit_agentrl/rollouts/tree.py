"""Tree rollouts (Tree-GRPO, arXiv 2509.21240): episodes that start from where others of their tree stood."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.chain import ChainRollout, check_limits
from lit_agentrl.rollouts.engine import rollout_seed
from lit_agentrl.rollouts.episode import CutActions, Episode, Player
from lit_agentrl.rollouts.expansion import Expansion, Uniform, ValueVariance
from lit_agentrl.rollouts.forest import Node, Tree
from lit_agentrl.types import Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)


class TreeRollout(RolloutStrategy):
    """Plays M trees for every prompt: a full episode each, then in L rounds N new branches from chosen steps of it.

    A node is one whole step of the agent, its thoughts, action and the environment's answer. A branch starts from the
    environment's state after the chosen step (its snapshot, or the actions carried out again where it has none, which
    is counted in `Ledger.replayed_steps`) and plays on to the end, so every branch adds one trajectory: G = M (N L + 1)
    of a prompt. Contexts of a tree begin alike, so the engine finds their keys and values in its cache, and training
    encodes a shared step once. All branches of a round are played side by side; rounds follow one another.

    Held-out tasks are played as chains.

    Args:
        max_steps: Actions an episode may take.
        trees: M, independent trees of a prompt.
        expansions: N, nodes of a tree that get a branch in a round.
        rounds: L; 0 leaves M chains.
        keep_leaves: K, trajectories of a tree that are kept for training, drawn at random; None keeps all, as the
            others are paid for as well.
        expansion: Chooses the nodes; None is `Uniform`, as in the paper.
        cut_actions: See `ChainRollout`.

    Raises:
        UserError: A shape that cannot be.
    """

    def __init__(
        self,
        max_steps: int = 4,
        trees: int = 2,
        expansions: int = 2,
        rounds: int = 1,
        keep_leaves: int | None = None,
        expansion: Expansion | None = None,
        cut_actions: CutActions = "stop",
    ) -> None:
        check_limits(max_steps, cut_actions)
        for name, value, least in (("trees", trees, 1), ("expansions", expansions, 1), ("rounds", rounds, 0)):
            if value < least:
                raise UserError(f"TreeRollout: {name}={value} must be at least {least}.")
        self.leaves = 1 + expansions * rounds
        """Trajectories of a tree."""
        if keep_leaves is not None and not 1 <= keep_leaves <= self.leaves:
            raise UserError(
                f"keep_leaves={keep_leaves}: a tree has {self.leaves} leaves (1 + expansions={expansions} x "
                f"rounds={rounds}). Give 1 to {self.leaves}, or null to keep all."
            )
        self.expansion = expansion or Uniform()
        if isinstance(self.expansion, ValueVariance) and rounds < 2:
            log.warning("ValueVariance with rounds=%d: no node has two returns to compare, so it is uniform.", rounds)
        self.max_steps, self.trees, self.expansions, self.rounds = max_steps, trees, expansions, rounds
        self.keep_leaves = keep_leaves
        self.cut_actions: CutActions = cut_actions

    def group_size(self, asked: int | None) -> int:
        """What the trees have: M K, or M (N L + 1).

        Raises:
            UserError: Something else is asked for.
        """
        has = self.trees * (self.keep_leaves or self.leaves)
        if asked is not None and asked != has:
            raise UserError(
                f"group_size={asked}, but trees={self.trees}, expansions={self.expansions}, rounds={self.rounds}, "
                f"keep_leaves={self.keep_leaves} give {has} trajectories of a prompt. Leave --data.group_size out."
            )
        return has

    def evaluation(self) -> RolloutStrategy:
        """Chains with the same limits."""
        return ChainRollout(self.max_steps, self.cut_actions)

    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        """The trees of every prompt, [P] groups in the order of `prompts`."""
        player = Player(context, self.max_steps, self.cut_actions)
        forest = [[Tree(prompt, index) for index in range(self.trees)] for prompt in prompts]
        trees = [tree for group in forest for tree in group]
        places = [(tree, tree.root) for tree in trees]
        for number in range(self.rounds + 1):
            player.branching = number < self.rounds  # nothing starts from what the last round plays
            self._grow(player, places)
            if player.branching:
                places = [(tree, node) for tree in trees for node in self._picks(tree, number, context)]
        return [self._group(prompt, group, context) for prompt, group in zip(prompts, forest, strict=True)]

    def _picks(self, tree: Tree, number: int, context: RolloutContext) -> list[Node]:
        return self.expansion.pick(tree.candidates(), self.expansions, _generator(tree, f"round {number}", context))

    def _grow(self, player: Player, places: list[tuple[Tree, Node]]) -> None:
        """Play one episode from each place, all side by side, and attach them."""
        episodes = []
        for tree, node in places:
            episodes.append(Episode(tree.prompt, tree.index * self.leaves + tree.num_started, node.fork()))
            tree.num_started += 1
        player.play(episodes)
        for (tree, node), episode in zip(places, episodes, strict=True):
            tree.graft(episode, node)

    def _group(self, prompt: Prompt, trees: Sequence[Tree], context: RolloutContext) -> TrajectoryGroup:
        """The prompt's trajectories, tree by tree; those that are not kept leave their cost behind."""
        group = TrajectoryGroup(prompt.task, [])
        for tree in trees:
            kept, dropped = self._split(tree, context)
            group.trajectories += kept
            group.num_not_begun += len(tree.not_begun)
            group.dropped_cost = sum((t.cost for t in (*dropped, *tree.not_begun)), group.dropped_cost)
        return group

    def _split(self, tree: Tree, context: RolloutContext) -> tuple[list[Trajectory], list[Trajectory]]:
        """K of the healthy trajectories at random with all failed ones (never trained, but counted), and the rest."""
        if self.keep_leaves is None:
            return tree.trajectories, []
        healthy = [i for i, t in enumerate(tree.trajectories) if not t.stop_reason.is_failure]
        order = _generator(tree, "kept leaves", context).permutation(healthy)
        dropped = set(order[self.keep_leaves :].tolist())
        parts: tuple[list[Trajectory], list[Trajectory]] = ([], [])
        for index, trajectory in enumerate(tree.trajectories):
            parts[index in dropped].append(trajectory)
        return parts


def _generator(tree: Tree, purpose: str, context: RolloutContext) -> np.random.Generator:
    """Randomness of a tree, whatever else is collected beside it."""
    return np.random.default_rng(
        rollout_seed(context.seed, context.iteration, f"{purpose} of {tree.prompt.number}", tree.index, 0)
    )
