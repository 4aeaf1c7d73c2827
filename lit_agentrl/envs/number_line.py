"""NumberLine of gym-cards: walk to a number by adding or taking away one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lit_agentrl.envs.actions import ActionFormat, check_action_format, format_hint
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.seeded import refuse_held_out, replay
from lit_agentrl.envs.sprites import BLUE, RED, WHITE, Image, ObservationKind, check_observation, draw_text, stack
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Observation, Split, WalkthroughSuite

STEPS = {"+": 1, "-": -1}


def pair_split(start: int, goal: int) -> Split:
    """The one split that asks to go from `start` to `goal`: 3/5 of the pairs train, 1/5 val, 1/5 test."""
    share = (start + 2 * goal) % 5
    return "val" if share == 3 else "test" if share == 4 else "train"


class NumberLineSuite(WalkthroughSuite):
    """Every pair of a start and another goal is a task, `2-to-5`, and in one split.

    The space is tiny (30 pairs with the default): held-out pairs are new, the numbers in them are not. A step pays 1
    at the goal, 0 when it leads closer, -1 when it does not, also at the ends of the line, which nobody leaves. Both
    actions are always `valid`; a reply that is neither changes nothing and pays `invalid_reward`.

    Args:
        max_position: The largest number; the smallest is 0.
        observation: `text` or `image` (the target white on red, the current number white on blue).
        scale: Pixels of the picture for each of the 5 x 7 of a digit.
        action_format: What a reply has to look like.
        invalid_reward: Paid for a reply that is no action.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        max_position: int = 5,
        observation: ObservationKind = "text",
        scale: int = 4,
        action_format: ActionFormat = "plain",
        invalid_reward: float = 0.0,
    ) -> None:
        check_action_format(action_format)
        check_observation(observation)
        for name, value, low, high in (("max_position", max_position, 4, 999), ("scale", scale, 1, 32)):
            if not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: allowed are {low} to {high}.")
        self._max_position = max_position
        self._scale = scale if observation == "image" else 0
        self._action_format: ActionFormat = action_format
        self._invalid_reward = invalid_reward

    def tasks(self, split: Split) -> Sequence[str]:
        """Every pair of the split, once."""
        numbers = range(self._max_position + 1)
        return [
            f"{start}-to-{goal}"
            for start in numbers
            for goal in numbers
            if start != goal and pair_split(start, goal) == split
        ]

    def make(self, task: str) -> NumberLineEnvironment:
        """A fresh episode of the pair."""
        start, goal = self._pair(task)
        return NumberLineEnvironment(
            start,
            goal,
            max_position=self._max_position,
            scale=self._scale,
            action_format=self._action_format,
            invalid_reward=self._invalid_reward,
        )

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """The straight way to the goal.

        Args:
            task: The pair.
            held_out: Allow a pair that is not of the train split.

        Raises:
            UserError: The pair is held out and `held_out` is False, so that no demonstration leaks by accident.
        """
        start, goal = self._pair(task)
        refuse_held_out(task, held_out or pair_split(start, goal) == "train")
        return replay(self.make(task), ["+" if goal > start else "-"] * abs(goal - start), self._action_format)

    def _pair(self, task: str) -> tuple[int, int]:
        start, _, goal = task.partition("-to-")
        if start.isdecimal() and goal.isdecimal() and task == f"{int(start)}-to-{int(goal)}":
            pair = int(start), int(goal)
            if pair[0] != pair[1] and max(pair) <= self._max_position:
                return pair
        raise UserError(
            f"task={task!r} is not a task of this suite; a task looks like '2-to-5', with two different numbers from 0 "
            f"to max_position={self._max_position}."
        )


class NumberLineEnvironment:
    """One walk.

    Args:
        start: The first number.
        goal: The number to reach.
        max_position: The largest number.
        scale: The size of the pictures; 0 for text.
        action_format: What a reply has to look like.
        invalid_reward: Paid for a reply that is no action.
    """

    def __init__(
        self,
        start: int,
        goal: int,
        *,
        max_position: int,
        scale: int,
        action_format: ActionFormat,
        invalid_reward: float,
    ) -> None:
        self._position = start
        self._goal = goal
        self._max_position = max_position
        self._scale = scale
        self._action_format = action_format
        self._invalid_reward = invalid_reward

    def reset(self) -> Observation:
        """The target and the first number; the rules are the system prompt."""
        colours = " The picture shows the target on red and the current number on blue." if self._scale else ""
        return self._observe(
            "",
            None,
            f"You are on a line of the numbers from 0 to {self._max_position}. + adds 1 to the current number, - takes "
            f"1 away; there is nothing beyond the ends. Reach the target.{colours}\n{format_hint(self._action_format)}",
        )

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The new number, what the step pays, and whether it is the target."""
        chosen = choose(action, STEPS, self._action_format)
        if chosen is None:
            return self._observe("That is not one of the actions.", False), self._invalid_reward, False
        before = abs(self._goal - self._position)
        self._position = min(self._max_position, max(0, self._position + STEPS[chosen]))
        after = abs(self._goal - self._position)
        reward = 1.0 if after == 0 else 0.0 if after < before else -1.0
        return self._observe("", True), reward, self.success

    @property
    def anchor(self) -> Hashable:
        """The goal and the current number."""
        return self._goal, self._position

    @property
    def success(self) -> bool:
        """Whether the current number is the target."""
        return self._position == self._goal

    def snapshot(self) -> object:
        """The current number."""
        return self._position

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot."""
        assert isinstance(snapshot, int)
        self._position = snapshot

    def close(self) -> None:
        """Nothing is held."""

    def _observe(self, feedback: str, valid: bool | None, system: str = "") -> Observation:
        goal = "" if self._scale else f"Target: {self._goal}"
        state = "" if self._scale else f"Current: {self._position}"
        return Observation(
            "\n".join(filter(None, [feedback, goal, state, "Actions: +, -"])),
            system,
            state=state,
            task=goal or "Reach the target.",
            actions=tuple(STEPS),
            valid=valid,
            images=(self._draw(),) if self._scale else (),
        )

    def _draw(self) -> Image:
        width = len(str(self._max_position))
        lines = ((self._goal, RED), (self._position, BLUE))
        digits = [draw_text(str(number).rjust(width), WHITE, ground, self._scale) for number, ground in lines]
        return stack(digits, WHITE, 4 * self._scale)
