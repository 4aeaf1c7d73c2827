"""Trees of episodes: a node is one whole step of the agent, and episodes share the steps they have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lit_agentrl.rewards import episode_return
from lit_agentrl.rollouts.base import Prompt
from lit_agentrl.rollouts.episode import EnvironmentState, Episode, Fork
from lit_agentrl.types import Step, Trajectory


@dataclass(slots=True, eq=False)
class Node:
    """One step of the agent and what the environment answered; the root is the prompt alone.

    A node holds its own step only: the way to it is found through the parents.
    """

    parent: Node | None = None
    step: Step | None = None
    state: EnvironmentState | None = None
    """Where the environment stood after the step; None at the root, and where no branch will ever begin."""
    children: list[Node] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    """The episodes that go through it."""

    @property
    def depth(self) -> int:
        """Steps from the prompt to here: 0 at the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def steps(self) -> list[Step]:
        """The steps from the prompt to here."""
        return [] if self.parent is None or self.step is None else [*self.parent.steps, self.step]

    @property
    def returns(self) -> list[float]:
        """What the environment paid in each healthy episode that goes through the node."""
        return [episode_return(t) for t in self.trajectories if not t.stop_reason.is_failure]

    @property
    def surprisal(self) -> float:
        """Mean of -log p over the tokens of the steps taken from here: a sample of the policy's entropy, in nats."""
        logprobs = [logprob for child in self.children if child.step for logprob in child.step.logprobs]
        return -sum(logprobs) / max(1, len(logprobs))

    def fork(self) -> Fork | None:
        """Where an episode that leaves here starts; None is the beginning."""
        return None if self.state is None else Fork(self.steps, self.state)


@dataclass(slots=True, eq=False)
class Tree:
    """All episodes of one tree of a prompt."""

    prompt: Prompt
    index: int
    root: Node = field(default_factory=Node)
    num_started: int = 0
    """Episodes started so far, which number the next one's randomness."""
    not_begun: list[Trajectory] = field(default_factory=list)
    """Those of them that the budget did not let act."""

    @property
    def trajectories(self) -> list[Trajectory]:
        """The tree's episodes, one for each leaf, in the order they were played."""
        return self.root.trajectories

    def candidates(self) -> list[Node]:
        """The nodes that can be expanded, level by level: the root, and every step that another one followed."""
        return [node for node in self._by_level() if node.parent is None or node.children]

    def graft(self, episode: Episode, start: Node) -> None:
        """Attach what an episode has played since it left `start`, as a branch of its own below it."""
        trajectory = episode.trajectory
        if not episode.is_begun:
            self.not_begun.append(trajectory)
            return
        trajectory.tree_id = self.index
        node: Node | None = start
        while node is not None:
            node.trajectories.append(trajectory)
            node = node.parent
        node, own = start, episode.own_steps
        for number, step in enumerate(own, start=1):
            is_followed = number < len(own)
            state = episode.states[number] if is_followed and episode.states else None
            child = Node(node, step, state, trajectories=[trajectory])
            node.children.append(child)
            node = child

    def _by_level(self) -> Iterator[Node]:
        level = [self.root]
        while level:
            yield from level
            level = [child for node in level for child in node.children]
