"""Chain rollouts: every trajectory is one agent in one environment, from the first prompt to the end."""

from __future__ import annotations

from collections.abc import Sequence

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.episode import CutActions, Episode, Player
from lit_agentrl.types import Ledger, TrajectoryGroup


class ChainRollout(RolloutStrategy):
    """Plays all episodes of an iteration side by side, each from the first prompt to its end.

    Args:
        max_steps: Actions an episode may take.
        cut_actions: A step whose action is cut at `max_new_tokens` ends the episode (`StopReason.LENGTH`), as its
            answer is incomplete; `continue` passes the cut text on instead.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(self, max_steps: int = 1, cut_actions: CutActions = "stop") -> None:
        check_limits(max_steps, cut_actions)
        self.max_steps = max_steps
        self.cut_actions: CutActions = cut_actions

    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        """`group_size` trajectories of every prompt, [P] groups in the order of `prompts`."""
        episodes = [[Episode(prompt, member) for member in range(group_size)] for prompt in prompts]
        Player(context, self.max_steps, self.cut_actions).play([e for group in episodes for e in group])
        return [_group(prompt, group) for prompt, group in zip(prompts, episodes, strict=True)]


def _group(prompt: Prompt, episodes: Sequence[Episode]) -> TrajectoryGroup:
    left_out = [episode.trajectory.cost for episode in episodes if not episode.is_begun]
    trajectories = [episode.trajectory for episode in episodes if episode.is_begun]
    return TrajectoryGroup(prompt.task, trajectories, dropped_cost=sum(left_out, Ledger()), num_not_begun=len(left_out))


def check_limits(max_steps: int, cut_actions: str) -> None:
    """Refuse limits under which no episode can be played.

    Raises:
        UserError: An argument is out of range.
    """
    if max_steps < 1:
        raise UserError(f"max_steps={max_steps}: an episode needs at least 1 step.")
    if cut_actions not in ("stop", "continue"):
        raise UserError(f"cut_actions={cut_actions!r} is unknown; allowed are 'stop' and 'continue'.")
