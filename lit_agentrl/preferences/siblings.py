"""Pairs from trees: different actions after the same steps, worth what the episodes below them earned (Tree-GRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lit_agentrl.preferences.candidates import Candidate, prompt_messages, shows_images_late
from lit_agentrl.rollouts.chat import ChatMode
from lit_agentrl.types import Step, Trajectory, TrajectoryGroup


@dataclass(slots=True)
class Branch:
    """An action, and the episodes that go on from it."""

    step: Step
    leaves: list[int] = field(default_factory=list)
    """Which trajectories of the group."""

    def value(self, trajectories: Sequence[Trajectory]) -> float:
        """What the episodes below earned on average."""
        return fmean(trajectories[i].total_reward for i in self.leaves)

    def is_correct(self, trajectories: Sequence[Trajectory]) -> bool | None:
        """Whether any of them solved the task; None where the environment says of none."""
        known = [t.success for i in self.leaves if (t := trajectories[i]).success is not None]
        return any(known) if known else None


def tree_siblings(
    group: TrajectoryGroup, mode: ChatMode = "append", pairs_per_node: int = 1, across_trees: bool = True
) -> list[Candidate]:
    """Pairs of actions that were taken after the same steps of a prompt's trees.

    At every node the actions are ranked by the mean reward of the episodes below them. The best is paired with the
    worst, then with the next worse ones. Failed episodes count nowhere.

    Args:
        group: The trajectories of a prompt; those of a tree share their `Step` objects.
        mode: How prompts were made.
        pairs_per_node: At most so many.
        across_trees: Let the first actions of all trees of the prompt compete, as they answer the same prompt.
    """
    healthy = {i: t for i, t in enumerate(group.trajectories) if not t.stop_reason.is_failure}
    nodes: dict[tuple[object, ...], dict[int, Branch]] = {}
    for i, trajectory in healthy.items():
        for depth, step in enumerate(trajectory.steps):
            way = tuple(id(before) for before in trajectory.steps[:depth])
            root = () if across_trees else (trajectory.tree_id,)
            branches = nodes.setdefault((root, way), {})
            branches.setdefault(id(step), Branch(step)).leaves.append(i)
    found = []
    for branches in nodes.values():
        found += _pairs(group, list(branches.values()), mode, pairs_per_node)
    return found


def _pairs(group: TrajectoryGroup, branches: list[Branch], mode: ChatMode, most: int) -> list[Candidate]:
    """The best branch against the worst ones."""
    trajectories = group.trajectories
    ranked = sorted(branches, key=lambda branch: (-branch.value(trajectories), branch.leaves[0]))
    best = ranked[0]
    steps = trajectories[best.leaves[0]].steps
    depth = next(k for k, step in enumerate(steps) if step is best.step)
    if shows_images_late(steps, depth, mode):
        return []
    return [
        Candidate(
            prompt=prompt_messages(steps, depth, mode),
            chosen=best.step.action,
            rejected=other.step.action,
            gap=best.value(trajectories) - other.value(trajectories),
            is_correct=best.is_correct(trajectories),
            images=best.step.images,
            provenance={
                "mode": "tree_siblings",
                "task": group.prompt_id,
                "step": depth,
                "chosen": _origin(best, trajectories),
                "rejected": _origin(other, trajectories),
            },
        )
        for other in ranked[:0:-1][:most]
    ]


def _origin(branch: Branch, trajectories: Sequence[Trajectory]) -> dict[str, object]:
    return {
        "trajectories": branch.leaves,
        "tree": trajectories[branch.leaves[0]].tree_id,
        "value": branch.value(trajectories),
        "rewards": [trajectories[i].total_reward for i in branch.leaves],
    }
