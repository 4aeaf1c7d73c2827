"""Microsoft TextWorld: bring things where they belong, in words (Côté et al. 2018, arXiv:1806.11532).

The worlds are sampled by `household.py` and played by TextWorld's logic engine, in Python: what its rules allow is
offered, what they change is the state, and its quest conditions decide who has won. Nothing is compiled with Inform 7,
which takes over a second a game; the text is written here, short enough for a small language model. A game takes well
under a millisecond to make and to step, so games are made from their seeds every time and never stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lit_agentrl.envs.household import (
    CONTAINERS,
    ROOMS,
    SUPPORTERS,
    THINGS,
    Difficulty,
    World,
    sample_world,
)
from lit_agentrl.envs.textworld_engine import TextWorldGame
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import Observation, Split, WalkthroughSuite

SYSTEM = "Reply with one of the commands."
COMMANDS = ("take", "put", "insert", "open", "go")
EXTRA_COMMANDS = ("close", "drop")
# A split draws its worlds from its own seeds, far more than anyone asks for.
SEEDS_PER_SPLIT = 10_000_000
SEEDS_PER_GAME = 20  # tried for each game asked for, before the options are said to allow no more different games


class TextWorldSuite(WalkthroughSuite):
    """Pick-and-place games of TextWorld, in splits that never overlap.

    A game asks to bring things to places; it pays 1 in all, by default when everything is there at once. The splits
    are disjoint three times over: by their seeds, by what is asked (no held-out game asks to bring a thing to a place
    that a training game brings it to), and by the content of the games, which is compared when the suite is made.

    The policy answers with one of the offered commands. Case, surrounding space and quotes, a leading `>` and a final
    period do not matter; only the first line that is not empty counts. Anything else changes nothing and is counted
    in `TextWorldEnvironment.invalid_actions`.

    With the defaults a game takes two commands ("take cup from table", "put cup on shelf") where 4 and then 7 are
    offered. The first prompt is 67 SmolLM2 tokens (89 with the chat template), a command 4. A policy that picks
    among the offered commands at random wins 6 % of the games in the 3 steps of `max_steps` and 9 % in 4 (measured).

    Args:
        num_train: Training games.
        num_val: Validation games.
        num_test: Test games.
        num_rooms: Rooms of a world; with more than one the player must find the way.
        num_places: Tables, boxes and the like of a world, spread over its rooms; the possible destinations.
        num_deliveries: Things to bring somewhere. Each adds two commands to the quest, plus the way between rooms.
        num_distractors: Things that the quest does not ask for.
        closed: Start with closed containers: what is in them is not seen, and `open` lengthens the quest.
        commands: The kinds of commands to offer, of take, put, insert, open, go, close, drop. The last two are never
            needed and only lead astray.
        dense: Pay on the way: half of a delivery's share when the thing is first in hand, the rest when it is where it
            belongs. Success is the same. Without it a policy that rarely wins gets groups without a signal.
        restate: Repeat the task and all that is seen in every observation, for rollouts that rebuild the prompt at each
            step. Otherwise later observations say what changed.

    Raises:
        UserError: An argument is out of range, or the options allow fewer different games than asked for.
    """

    def __init__(
        self,
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 128,
        num_rooms: int = 1,
        num_places: int = 4,
        num_deliveries: int = 1,
        num_distractors: int = 3,
        closed: bool = False,
        commands: Sequence[str] = COMMANDS,
        dense: bool = False,
        restate: bool = False,
    ) -> None:
        self._difficulty = Difficulty(num_rooms, num_places, num_deliveries, num_distractors, closed)
        self._check({"num_train": num_train, "num_val": num_val, "num_test": num_test}, commands)
        try:
            import_module("textworld")
        except ModuleNotFoundError as error:
            if error.name != "textworld":  # installed, but broken: its own message tells more
                raise
            raise missing_extra("textworld", "textworld", "TextWorldSuite") from None
        self._worlds = self._sample({"train": num_train, "val": num_val, "test": num_test})
        self._commands = tuple(commands)
        self._dense = dense
        self._restate = restate
        self._games: dict[str, TextWorldGame] = {}
        longest = max((len(world.walkthrough()) for world in self._worlds.values()), default=1)
        self.max_steps = (3 * longest + 1) // 2
        """Steps that an episode should be given (the rollout's `max_steps`): half again what any solution needs."""

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's games, the same for the same options however many games the other splits have."""
        return [task for task in self._worlds if task.startswith(f"{split}-")]

    def make(self, task: str) -> TextWorldEnvironment:
        """A fresh episode of the game."""
        world = self._world(task)
        game = self._games.get(task)
        if game is None:  # two threads may both get here: the games they make are equal, and the first is kept
            game = self._games.setdefault(task, TextWorldGame(world, self._commands))
        return TextWorldEnvironment(game, dense=self._dense, restate=self._restate)

    def walkthrough(self, task: str, held_out: bool = False) -> list[tuple[Observation, str]]:
        """The commands that win the game, each with the observation before it.

        Args:
            task: The game.
            held_out: Allow a game that is not of the train split.

        Raises:
            UserError: The game is held out and `held_out` is False, so that no demonstration leaks by accident.
        """
        world = self._world(task)
        if not held_out and not task.startswith("train-"):
            raise UserError(f"task={task!r} is held out: training on its walkthrough would void the evaluation.")
        environment = self.make(task)
        observation, turns = environment.reset(), []
        for command in world.walkthrough():
            turns.append((observation, command))
            observation, _, _ = environment.step(command)
        return turns

    def digest(self, task: str) -> str:
        """A hash of the game's content: two games are the same exactly if their digests are."""
        return self._world(task).digest

    def _world(self, task: str) -> World:
        if task not in self._worlds:
            raise UserError(f"task={task!r} is not a game of this suite; a task looks like 'train-0'.")
        return self._worlds[task]

    def _check(self, counts: dict[str, int], commands: Sequence[str]) -> None:
        d = self._difficulty
        limits = {name: (count, 0, SEEDS_PER_SPLIT // SEEDS_PER_GAME) for name, count in counts.items()} | {
            "num_rooms": (d.num_rooms, 1, len(ROOMS)),
            "num_places": (d.num_places, 2, len(SUPPORTERS + CONTAINERS)),
            "num_deliveries": (d.num_deliveries, 1, 8),  # each split has 8 things to ask for at each place
            "num_distractors": (d.num_distractors, 0, len(THINGS) - d.num_deliveries),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: allowed are {low} to {high}.")
        needed = {"take", "put", "insert"} | ({"open"} if d.closed else set()) | ({"go"} if d.num_rooms > 1 else set())
        if unknown := set(commands) - {*COMMANDS, *EXTRA_COMMANDS}:
            raise UserError(f"commands: {sorted(unknown)} unknown; allowed are {[*COMMANDS, *EXTRA_COMMANDS]}.")
        if missing := needed - set(commands):
            raise UserError(f"commands: without {sorted(missing)} some of these games cannot be won; add them.")

    def _sample(self, counts: dict[Split, int]) -> dict[str, World]:
        """The games of all splits by task id; a world that its split already has is passed over."""
        worlds: dict[str, World] = {}
        owners: dict[str, Split] = {}
        for first_seed, (split, count) in zip(
            range(0, 3 * SEEDS_PER_SPLIT, SEEDS_PER_SPLIT), counts.items(), strict=True
        ):
            number = 0
            for seed in range(first_seed, first_seed + SEEDS_PER_GAME * count):
                if number == count:
                    break
                world = sample_world(seed, split, self._difficulty)
                owner = owners.get(world.digest)
                if owner is None:
                    owners[world.digest] = split
                    worlds[f"{split}-{number}"] = world
                    number += 1
                elif owner != split:
                    raise UserError(f"The game of seed {seed} in split {split!r} is also in split {owner!r}.")
            if number < count:
                raise UserError(
                    f"num_{split}={count}: only {number} different games were found; make the worlds larger."
                )
        return worlds


class TextWorldEnvironment:
    """One episode of a game. Equal states of a game have equal anchors; `snapshot` and `restore` are cheap.

    Args:
        game: The game, which episodes may share.
        dense: Pay for progress, not only for winning.
        restate: Repeat the task and the scene in every observation.
    """

    def __init__(self, game: TextWorldGame, *, dense: bool = False, restate: bool = False) -> None:
        self._game = game
        self._dense = dense
        self._paid = 0.0
        self._restate = restate
        self._state = game.start.copy()
        self._actions = game.actions(self._state)
        self.valid_actions = 0
        """Actions so far that were an offered command."""
        self.invalid_actions = 0
        """Actions so far that were not, and changed nothing."""

    def reset(self) -> Observation:
        """The task, what is seen, and the commands."""
        return Observation(self._with_commands(self._scene()), SYSTEM)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What happened and the next commands; what it pays, 1 over the whole game; and whether the game is won."""
        chosen = self._actions.get(normalize(action))
        if chosen is None:
            self.invalid_actions += 1
            feedback = "That is not one of the commands."
        else:
            self.valid_actions += 1
            self._state.apply(chosen)
            self._actions = self._game.actions(self._state)
            feedback = self._game.feedback(chosen)
        if self.success:
            return Observation(f"{feedback} You win."), 1.0 - self._paid, True
        if self._restate:
            feedback = f"{feedback}\n{self._scene()}"
        elif chosen is not None:
            feedback = f"{feedback} {self._game.news(self._state, chosen)}".strip()
        return Observation(self._with_commands(feedback)), self._pay_progress(), False

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
        return Snapshot(self._state.copy(), self._paid, self.valid_actions, self.invalid_actions)

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this game, of this episode or another."""
        assert isinstance(snapshot, Snapshot)
        self._state = snapshot.state.copy()
        self._actions = self._game.actions(self._state)
        self._paid = snapshot.paid
        self.valid_actions, self.invalid_actions = snapshot.valid_actions, snapshot.invalid_actions

    def close(self) -> None:
        """Nothing is held."""

    def _pay_progress(self) -> float:
        """What the newest state is worth beyond what was paid: nobody earns twice by putting things back."""
        gain = max(0.0, self._game.progress(self._state) - self._paid) if self._dense else 0.0
        self._paid += gain
        return gain

    def _scene(self) -> str:
        return f"Task: {self._game.world.task}.\n{self._game.describe(self._state)}"

    def _with_commands(self, text: str) -> str:
        return "\n".join([text, "Commands:", *self._actions])


@dataclass(slots=True, frozen=True)
class Snapshot:
    """The state of an episode, in TextWorld's logic, what it has paid, and its counters."""

    state: Any
    paid: float
    valid_actions: int
    invalid_actions: int


def normalize(action: str) -> str:
    """The command meant by a reply: its first line that is not empty, lower case, without quotes and final period."""
    line = next((line for line in action.splitlines() if line.strip()), "")
    return " ".join(line.lower().strip(" \t>.\"'`“”‘’").split())
