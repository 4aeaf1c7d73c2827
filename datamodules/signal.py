"""Which trajectories of a group count, and whether they tell the policy anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lit_agentrl.types import Trajectory, TrajectoryGroup


def without_failures(group: TrajectoryGroup) -> TrajectoryGroup:
    """The group without the trajectories that the environment broke."""
    return TrajectoryGroup(group.prompt_id, [t for t in group.trajectories if not t.stop_reason.is_failure])


def has_signal(group: TrajectoryGroup, signal: Literal["reward", "success"]) -> bool:
    """Whether the group's trajectories differ in what they earned."""
    value: Callable[[Trajectory], object] = (
        (lambda t: t.total_reward) if signal == "reward" else (lambda t: bool(t.success))
    )
    return len({value(t) for t in without_failures(group).trajectories}) > 1
