"""Microsoft TextWorld: bring things where they belong, in words (Côté et al. 2018, arXiv:1806.11532).

The worlds are sampled by `household.py` and played by TextWorld's logic engine, in Python: what its rules allow is
offered, what they change is the state, and its quest conditions decide who has won. Nothing is compiled with Inform 7,
which takes over a second a game; the text is written here, short enough for a small language model. A game takes well
under a millisecond to make and to step, so games are made from their seeds every time and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Literal

from lit_agentrl.envs.actions import ActionFormat, check_action_format
from lit_agentrl.envs.household import (
    COLOURS,
    CONTAINERS,
    ROOMS,
    SUPPORTERS,
    THINGS,
    Difficulty,
    World,
    sample_world,
)
from lit_agentrl.envs.household_plan import winning_plan
from lit_agentrl.envs.seeded import SEEDS_PER_SPLIT, refuse_held_out, replay
from lit_agentrl.envs.textworld_engine import TextWorldGame
from lit_agentrl.envs.textworld_episode import TextWorldEnvironment
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import Conversation, Split, WalkthroughSuite

Level = Literal["easy", "medium", "hard"]
LEVELS: dict[Level, Difficulty] = {
    "easy": Difficulty(num_rooms=1, num_places=4, num_deliveries=1, num_distractors=3, closed=False),
    "medium": Difficulty(
        num_rooms=3,
        num_places=5,
        num_deliveries=1,
        num_distractors=2,
        closed=True,
        num_doors=1,
        min_commands=6,
        max_commands=8,
        directions=True,
    ),
    "hard": Difficulty(
        num_rooms=4,
        num_places=6,
        num_deliveries=2,
        num_distractors=2,
        closed=True,
        num_doors=2,
        num_locked=1,
        min_commands=9,
        max_commands=12,
        directions=True,
    ),
}
COMMANDS = ("take", "put", "insert", "open", "go", "unlock")
EXTRA_COMMANDS = ("close", "drop")
SEEDS_PER_GAME = 50  # tried for each game asked for, before the options are said to allow no more different games


class TextWorldSuite(WalkthroughSuite):
    """Pick-and-place games of TextWorld, in splits that never overlap.

    A game asks to bring things to places; it pays 1 in all, by default when everything is there at once. The splits
    are disjoint three times over: by their seeds, by what is asked (no held-out game asks to bring a thing to a place
    that a training game brings it to), and by the content of the games, which is compared when the suite is made.

    The policy answers with one of the offered commands. Case, surrounding space and quotes, a leading `>` and a final
    period do not matter. Anything else changes nothing and is not `valid`.

    At level `easy` a game takes two commands ("take cup from table", "put cup on shelf") where 4 and then 7 are
    offered. The first prompt is 67 SmolLM2 tokens (89 with the chat template), a command 4. A policy that picks
    among the offered commands at random wins 6 % of the games in the 3 steps of `max_steps` and 9 % in 4 (measured).

    Args:
        num_train: Training games.
        num_val: Validation games.
        num_test: Test games.
        level: What the options below are where they are not given: `easy`, `medium` (6 to 8 commands through 3 rooms, a
            closed door and closed containers) or `hard` (two things, 9 to 12 commands, 4 rooms, a locked door).
        num_rooms: Rooms of a world; with more than one the player must find the way.
        num_places: Tables, boxes and the like of a world, spread over its rooms; the possible destinations.
        num_deliveries: Things to bring somewhere. Each adds two commands to the quest, plus the way between rooms.
        num_distractors: Things that the quest does not ask for.
        closed: Start with closed containers: what is in them is not seen, and `open` lengthens the quest.
        num_doors: Passages between rooms that a closed door blocks.
        num_locked: Doors that are locked; their keys lie about.
        min_commands: Leave out games whose winning plan is shorter.
        max_commands: Leave out games whose winning plan is longer.
        directions: Say in the task which rooms the things are in and go to. Without it they must be looked for.
        commands: The kinds of commands to offer, of take, put, insert, open, go, unlock, close, drop. The last two are
            never needed and only lead astray.
        dense: Pay on the way: half of a delivery's share when the thing is first in hand, the rest when it is where it
            belongs. Success is the same. Without it a policy that rarely wins gets groups without a signal.
        restate: Repeat the task and all that is seen in every observation, for rollouts that rebuild the prompt at each
            step. Otherwise later observations say what changed.
        action_format: What a reply has to look like.

    Raises:
        UserError: An argument is out of range, or the options allow fewer different games than asked for.
    """

    def __init__(
        self,
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 128,
        level: Level = "easy",
        num_rooms: int | None = None,
        num_places: int | None = None,
        num_deliveries: int | None = None,
        num_distractors: int | None = None,
        closed: bool | None = None,
        num_doors: int | None = None,
        num_locked: int | None = None,
        min_commands: int | None = None,
        max_commands: int | None = None,
        directions: bool | None = None,
        commands: Sequence[str] = COMMANDS,
        dense: bool = False,
        restate: bool = False,
        action_format: ActionFormat = "plain",
    ) -> None:
        given = {
            "num_rooms": num_rooms,
            "num_places": num_places,
            "num_deliveries": num_deliveries,
            "num_distractors": num_distractors,
            "closed": closed,
            "num_doors": num_doors,
            "num_locked": num_locked,
            "min_commands": min_commands,
            "max_commands": max_commands,
            "directions": directions,
        }
        if level not in LEVELS:
            raise UserError(f"level={level!r} is unknown; allowed are {', '.join(LEVELS)}.")
        check_action_format(action_format)
        chosen = {name: value for name, value in given.items() if value is not None}
        self._difficulty = replace(LEVELS[level], **chosen)  # type: ignore[arg-type]
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
        self._action_format: ActionFormat = action_format
        self._games: dict[str, TextWorldGame] = {}
        longest = max((len(winning_plan(world)) for world in self._worlds.values()), default=1)
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
        return TextWorldEnvironment(
            game,
            dense=self._dense,
            restate=self._restate,
            directions=self._difficulty.directions,
            action_format=self._action_format,
        )

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """The commands that win the game, each with the observation before it.

        Args:
            task: The game.
            held_out: Allow a game that is not of the train split.

        Raises:
            UserError: The game is held out and `held_out` is False, so that no demonstration leaks by accident.
        """
        world = self._world(task)
        refuse_held_out(task, held_out)
        return replay(self.make(task), winning_plan(world), self._action_format)

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
            "num_doors": (d.num_doors, 0, min(d.num_rooms - 1, len(COLOURS))),
            "num_locked": (d.num_locked, 0, d.num_doors),
            "min_commands": (d.min_commands, 1, d.max_commands),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UserError(f"{name}={value} is out of range: allowed are {low} to {high}.")
        needed = {"take", "put", "insert"}
        needed |= {"open"} if d.closed or d.num_doors else set()
        needed |= {"go"} if d.num_rooms > 1 else set()
        needed |= {"unlock"} if d.num_locked else set()
        if unknown := set(commands) - {*COMMANDS, *EXTRA_COMMANDS}:
            raise UserError(f"commands: {sorted(unknown)} unknown; allowed are {[*COMMANDS, *EXTRA_COMMANDS]}.")
        if missing := needed - set(commands):
            raise UserError(f"commands: without {sorted(missing)} some of these games cannot be won; add them.")

    def _sample(self, counts: dict[Split, int]) -> dict[str, World]:
        """The games of all splits by task id; worlds that are too short, too long or there already are passed over."""
        shortest, longest = self._difficulty.min_commands, self._difficulty.max_commands
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
                if not shortest <= len(winning_plan(world)) <= longest:
                    continue
                owner = owners.get(world.digest)
                if owner is None:
                    owners[world.digest] = split
                    worlds[f"{split}-{number}"] = world
                    number += 1
                elif owner != split:
                    raise UserError(f"The game of seed {seed} in split {split!r} is also in split {owner!r}.")
            if number < count:
                raise UserError(
                    f"num_{split}={count}: only {number} different games were found; make the worlds larger, or "
                    f"widen min_commands={shortest} and max_commands={longest}."
                )
        return worlds
