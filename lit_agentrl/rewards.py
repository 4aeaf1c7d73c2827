"""Rewards: plain functions of a finished trajectory, joined as a weighted sum; and the parsers they share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lit_agentrl.errors import UserError
from lit_agentrl.types import Trajectory, TrajectoryGroup


def episode_return(trajectory: Trajectory) -> float:
    """The undiscounted sum of what the environment paid."""
    return sum(step.reward for step in trajectory.steps)


def solved(trajectory: Trajectory) -> float:
    """1 where the environment says the task is solved, else 0."""
    return float(bool(trajectory.success))


def num_steps(trajectory: Trajectory) -> float:
    """The number of actions; give it a small negative weight to prefer short episodes."""
    return float(len(trajectory.steps))


def unfinished(trajectory: Trajectory) -> float:
    """1 where a limit cut the episode before the environment ended it, and so before it could pay; else 0.

    Give it a negative weight where a bad end is paid below 0: the policy would learn to run into the limit instead.
    """
    return float(trajectory.stop_reason.is_truncation)


@dataclass(slots=True)
class SoftOverlong:
    """DAPO's soft length penalty (arXiv 2503.14476 Eq. 13) on the sampled tokens T of a trajectory, in [-1, 0].

    0 up to `limit - cache`, then linear, -1 from `limit` on.
    """

    limit: int
    cache: int

    def __post_init__(self) -> None:
        """Refuse a cache that is not inside the limit."""
        if not 0 < self.cache <= self.limit:
            raise UserError(f"SoftOverlong(limit={self.limit}, cache={self.cache}): needs 0 < cache <= limit.")

    def __call__(self, trajectory: Trajectory) -> float:
        """The penalty of a trajectory."""
        tokens = sum(len(step.action_ids) for step in trajectory.steps)
        return -min(1.0, max(0.0, (tokens - (self.limit - self.cache)) / self.cache))


@dataclass
class Reward:
    """One component of the total reward.

    Args:
        function: Import path of a function of a trajectory, or a class with its `init_args`.
        weight: Its factor in the sum.
        name: What it is logged as (`reward/<name>`); the function's own name by default.
    """

    function: Callable[[Trajectory], float] = episode_return
    weight: float = 1.0
    name: str | None = None

    @property
    def label(self) -> str:
        """The name it is logged under."""
        return self.name or str(getattr(self.function, "__name__", type(self.function).__name__))


def score(groups: Iterable[TrajectoryGroup], rewards: Sequence[Reward]) -> None:
    """Fill `rewards` and `total_reward` of every trajectory that did not fail.

    Raises:
        UserError: A reward function returned something that is not a finite number.
    """
    for group in groups:
        for trajectory in group.trajectories:
            if trajectory.stop_reason.is_failure:
                continue
            trajectory.rewards = {reward.label: _value(reward, trajectory, group.prompt_id) for reward in rewards}
            trajectory.total_reward = sum(r.weight * trajectory.rewards[r.label] for r in rewards)


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Refuse an empty list and two components of one name, which would hide each other in the log."""
    names = [reward.label for reward in rewards]
    if not names:
        raise UserError(
            "rewards=[]: at least one reward is needed, e.g. `function: lit_agentrl.rewards.episode_return`."
        )
    if len(set(names)) < len(names):
        raise UserError(f"rewards {names}: two have the same name; set `name` on one of them.")


def _value(reward: Reward, trajectory: Trajectory, prompt_id: str) -> float:
    value = float(reward.function(trajectory))
    if not math.isfinite(value):
        raise UserError(
            f"reward {reward.label!r} returned {value} for prompt {prompt_id!r}; it must be a finite number."
        )
    return value


def parse_answer(text: str, tag: str = "answer") -> str | None:
    """The text inside the last complete `<tag>...</tag>` of a response, or None.

    Judge the response alone: a prompt that explains the tags would otherwise be parsed as an answer.
    """
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, flags=re.DOTALL | re.IGNORECASE)
    return str(found[-1]).strip() if found else None


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text names: an exact match first, else the longest label contained as whole words.

    The longest wins so that "seborrheic keratosis" is not read as "keratosis". Two equally long labels at different
    places give the later one, as the last word of an answer is its conclusion.
    """
    plain = _plain(text)
    exact = [label for label in labels if _plain(label) == plain]
    if exact:
        return exact[0]
    places = [
        (len(_plain(label)), place, label) for label in labels if (place := _last_place(_plain(label), plain)) >= 0
    ]
    return max(places)[2] if places else None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _last_place(label: str, text: str) -> int:
    found = [match.start() for match in re.finditer(rf"\b{re.escape(label)}\b", text)] if label else []
    return found[-1] if found else -1
