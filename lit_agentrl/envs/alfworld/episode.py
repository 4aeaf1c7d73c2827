"""One episode of an ALFWorld game: what the policy is shown, what its replies do, and what that pays."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from lit_agentrl.envs.actions import ActionFormat, format_hint, parse_action
from lit_agentrl.envs.alfworld.game import ALFWorldGame
from lit_agentrl.envs.alfworld.matching import Facts
from lit_agentrl.envs.choices import choose
from lit_agentrl.types import Observation

Validity = Literal["admissible", "format"]

SYSTEM = "Reply with one of the commands."
NOTHING = "Nothing happens."
"""What ALFWorld says to every command that cannot be carried out."""
NOT_OFFERED = frozenset(["help"])
"""Accepted, but not listed, as in GiGPO's experiments: it tells nothing that the list of commands does not."""


@dataclass(frozen=True, slots=True)
class Display:
    """How an episode talks to the policy.

    Attributes:
        action_format: What a reply has to look like.
        commands: List the admissible commands in every observation.
        validity: Whether `valid` asks for an admissible command or for the right format only.
        reward: What winning pays.
    """

    action_format: ActionFormat = "plain"
    commands: bool = True
    validity: Validity = "admissible"
    reward: float = 10.0


@dataclass(slots=True, frozen=True)
class Snapshot:
    """The state of an episode."""

    state: Facts


class ALFWorldEnvironment:
    """One episode of a game. Equal states of a game have equal anchors; `snapshot` and `restore` cost nothing.

    Args:
        game: The game, which episodes share.
        display: How to talk to the policy.
    """

    def __init__(self, game: ALFWorldGame, display: Display) -> None:
        self._game = game
        self._display = display
        self._state = game.start
        self._moves = game.moves(game.start)

    def reset(self) -> Observation:
        """The room, the task and the commands."""
        intro = self._game.intro()
        plain = self._display.action_format == "plain"
        system = SYSTEM if plain else f"{SYSTEM} {format_hint(self._display.action_format)}"
        return self._observe(intro, None, system)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What the game answers; the reward, which winning alone pays; and whether the game is won."""
        command = choose(action, self._moves, self._display.action_format)
        if command is None:
            feedback = NOTHING
        else:
            move = self._moves[command]
            self._state = self._game.apply(self._state, move)
            self._moves = self._game.moves(self._state)
            feedback = self._game.feedback(self._state, move)
        valid = command is not None
        if self._display.validity == "format":
            valid = parse_action(action, self._display.action_format) is not None
        won = self.success
        return self._observe(feedback, valid), self._display.reward if won else 0.0, won

    @property
    def commands(self) -> list[str]:
        """The commands on offer."""
        return [command for command in self._moves if command not in NOT_OFFERED]

    @property
    def anchor(self) -> Hashable:
        """A hash of the game and of all that holds: where the agent is, what it carries, where things are and how."""
        return self._game.key(self._state)

    @property
    def success(self) -> bool:
        """Whether the goal holds."""
        return self._game.is_won(self._state)

    def snapshot(self) -> object:
        """The state of the episode."""
        return Snapshot(self._state)

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this game, of this episode or another."""
        assert isinstance(snapshot, Snapshot)
        self._state = snapshot.state
        self._moves = self._game.moves(self._state)

    def close(self) -> None:
        """Nothing is held."""

    def _observe(self, said: str, valid: bool | None, system: str = "") -> Observation:
        commands = self.commands
        text = "\n".join([said, "Commands:", *commands]) if self._display.commands else said
        return Observation(text, system, state=said, task=self._game.task, actions=tuple(commands), valid=valid)
