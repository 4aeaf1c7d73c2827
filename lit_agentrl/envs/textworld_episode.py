"""One episode of a TextWorld game: what the policy is shown, what its replies do, and what that pays."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from lit_agentrl.envs.actions import ActionFormat, format_hint
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.textworld_engine import TextWorldGame
from lit_agentrl.types import Observation

SYSTEM = "Reply with one of the commands."


class TextWorldEnvironment:
    """One episode of a game. Equal states of a game have equal anchors; `snapshot` and `restore` are cheap.

    Args:
        game: The game, which episodes may share.
        dense: Pay for progress, not only for winning.
        restate: Repeat the task and the scene in every observation.
        directions: Say in the task which rooms to go to.
        action_format: What a reply has to look like.
    """

    def __init__(
        self,
        game: TextWorldGame,
        *,
        dense: bool = False,
        restate: bool = False,
        directions: bool = False,
        action_format: ActionFormat = "plain",
    ) -> None:
        self._game = game
        self._dense = dense
        self._paid = 0.0
        self._restate = restate
        self._action_format = action_format
        self._task = f"{game.world.task}." + (f" {game.world.directions}" if directions else "")
        self._state = game.start.copy()
        self._actions = game.actions(self._state)

    def reset(self) -> Observation:
        """The task, what is seen, and the commands."""
        scene = self._game.describe(self._state)
        system = SYSTEM if self._action_format == "plain" else f"{SYSTEM} {format_hint(self._action_format)}"
        return Observation(
            self._with_commands(self._with_task(scene)), system, state=scene, task=self._task, actions=self._offered
        )

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What happened and the next commands; what it pays, 1 over the whole game; and whether the game is won."""
        command = choose(action, self._actions, self._action_format)
        if command is None:
            feedback, news = "That is not one of the commands.", ""
        else:
            chosen = self._actions[command]
            self._state.apply(chosen)
            self._actions = self._game.actions(self._state)
            feedback, news = self._game.feedback(chosen), self._game.news(self._state, chosen)
        valid = command is not None
        if self.success:
            won = f"{feedback} You win."
            return Observation(won, state=won, task=self._task, valid=valid), 1.0 - self._paid, True
        if self._restate:
            scene = self._game.describe(self._state)
            text, state = f"{feedback}\n{self._with_task(scene)}", f"{feedback}\n{scene}"
        else:
            text = state = f"{feedback} {news}".strip()
        observation = Observation(
            self._with_commands(text), state=state, task=self._task, actions=self._offered, valid=valid
        )
        return observation, self._pay_progress(), False

    @property
    def commands(self) -> list[str]:
        """The commands on offer."""
        return list(self._actions)

    @property
    def anchor(self) -> Hashable:
        """A hash of the game and of every fact that holds now, seen or not."""
        facts = sorted(map(str, self._state.facts))
        return hashlib.sha256("\n".join([self._game.world.digest, *facts]).encode()).hexdigest()[:32]

    @property
    def success(self) -> bool:
        """Whether the game is won."""
        return self._game.is_won(self._state)

    def snapshot(self) -> object:
        """The state of the episode."""
        return Snapshot(self._state.copy(), self._paid)

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this game, of this episode or another."""
        assert isinstance(snapshot, Snapshot)
        self._state = snapshot.state.copy()
        self._actions = self._game.actions(self._state)
        self._paid = snapshot.paid

    def close(self) -> None:
        """Nothing is held."""

    def _pay_progress(self) -> float:
        """What the newest state is worth beyond what was paid: nobody earns twice by putting things back."""
        gain = max(0.0, self._game.progress(self._state) - self._paid) if self._dense else 0.0
        self._paid += gain
        return gain

    @property
    def _offered(self) -> tuple[str, ...]:
        return tuple(self._actions)

    def _with_task(self, scene: str) -> str:
        return f"Task: {self._task}\n{scene}"

    def _with_commands(self, text: str) -> str:
        return "\n".join([text, "Commands:", *self._actions])


@dataclass(slots=True, frozen=True)
class Snapshot:
    """The state of an episode in TextWorld's logic, and what it has paid."""

    state: Any
    paid: float
