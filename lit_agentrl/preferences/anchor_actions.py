"""Pairs from steps that were taken in the same state, worth what was earned from there on (GiGPO's anchors)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lit_agentrl.anchors import AnchorKind, anchor_keys
from lit_agentrl.preferences.candidates import Candidate, prompt_messages, shows_images_late
from lit_agentrl.rollouts.chat import ChatMode
from lit_agentrl.types import Step, Trajectory, TrajectoryGroup


@dataclass(slots=True, frozen=True)
class Visit:
    """One step in a state."""

    trajectory: int
    time: int
    step: Step
    value: float
    """Its discounted return."""


def discounted(trajectory: Trajectory, gamma: float) -> list[float]:
    """The return of every step, R_t = r_t + gamma R_(t+1), [K].

    Steps are paid what the environment paid them, and the last one also what the episode's reward holds beyond their
    sum, as GiGPO's are.
    """
    paid = [step.reward for step in trajectory.steps]
    if paid:
        paid[-1] += trajectory.total_reward - sum(paid)
    returns, following = [], 0.0
    for reward in reversed(paid):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def anchor_actions(
    group: TrajectoryGroup,
    mode: ChatMode = "append",
    gamma: float = 0.95,
    anchor: AnchorKind = "text",
    history: int = 2,
    pairs_per_state: int = 1,
    same_prompt: bool = False,
) -> list[Candidate]:
    """Pairs of actions that were taken in the same state of a task, by different returns.

    An action is worth the mean return of the steps that took it there; a step that trajectories of a tree share counts
    once, with the mean of its returns. The prompt is that of the best action's first step: the other action may have
    been taken after another history, which the provenance says (`same_prompt`).

    Args:
        group: The trajectories of a prompt.
        mode: How prompts were made.
        gamma: Discount of the returns.
        anchor: What makes two states the same (see `lit_agentrl.anchors.anchor_keys`).
        history: Of `text_history`.
        pairs_per_state: At most so many.
        same_prompt: Leave out actions that answered another prompt.
    """
    states: dict[Hashable, list[Visit]] = {}
    for i, trajectory in enumerate(group.trajectories):
        if trajectory.stop_reason.is_failure:
            continue
        returns = discounted(trajectory, gamma)
        for time, key in enumerate(anchor_keys(trajectory, anchor, history)):
            states.setdefault(key, []).append(Visit(i, time, trajectory.steps[time], returns[time]))
    found = []
    for visits in states.values():
        found += _pairs(group, _by_action(visits), mode, pairs_per_state, same_prompt)
    return found


def _by_action(visits: Sequence[Visit]) -> list[list[Visit]]:
    """Visits that took the same action, the best action first."""
    actions: dict[str, list[Visit]] = {}
    for visit in visits:
        actions.setdefault(visit.step.action.strip(), []).append(visit)
    return sorted(actions.values(), key=lambda taken: (-_value(taken), taken[0].trajectory, taken[0].time))


def _value(visits: Sequence[Visit]) -> float:
    """The mean over steps of their mean returns."""
    steps: dict[int, list[float]] = {}
    for visit in visits:
        steps.setdefault(id(visit.step), []).append(visit.value)
    return fmean(fmean(returns) for returns in steps.values())


def _pairs(
    group: TrajectoryGroup, actions: list[list[Visit]], mode: ChatMode, most: int, same_prompt: bool
) -> list[Candidate]:
    best = actions[0]
    first = best[0]
    steps = group.trajectories[first.trajectory].steps
    if shows_images_late(steps, first.time, mode):
        return []
    found = []
    for other in actions[:0:-1]:
        same = [visit for visit in other if list(visit.step.context_ids) == list(first.step.context_ids)]
        if same_prompt and not same:
            continue
        candidate = Candidate(
            prompt=prompt_messages(steps, first.time, mode),
            chosen=first.step.action,
            rejected=other[0].step.action,
            gap=_value(best) - _value(other),
            is_correct=_correct(group, best),
            images=first.step.images,
            provenance={
                "mode": "anchor_actions",
                "task": group.prompt_id,
                "same_prompt": bool(same),
                "chosen": _origin(best),
                "rejected": _origin(other),
            },
        )
        found.append(candidate)
    return found[:most]


def _correct(group: TrajectoryGroup, visits: Sequence[Visit]) -> bool | None:
    """Whether any episode that took the action solved the task."""
    known = [success for visit in visits if (success := group.trajectories[visit.trajectory].success) is not None]
    return any(known) if known else None


def _origin(visits: Sequence[Visit]) -> dict[str, object]:
    return {
        "steps": [[visit.trajectory, visit.time] for visit in visits],
        "value": _value(visits),
        "returns": [visit.value for visit in visits],
    }
