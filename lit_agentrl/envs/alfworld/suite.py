"""ALFWorld: household tasks in text (Shridhar et al. 2021, arXiv:2010.03768)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from lit_agentrl.envs.actions import ActionFormat, check_action_format
from lit_agentrl.envs.alfworld.episode import ALFWorldEnvironment, Display, Validity
from lit_agentrl.envs.alfworld.files import (
    FOLDERS,
    GAME,
    KINDS,
    BrokenGame,
    GameText,
    TextRelease,
    find_data,
    in_release,
    read_game,
    task_kind,
)
from lit_agentrl.envs.alfworld.game import ALFWorldGame
from lit_agentrl.envs.alfworld.grammar import GrammarError
from lit_agentrl.envs.alfworld.panel import playable_games
from lit_agentrl.envs.alfworld.pddl import PddlError
from lit_agentrl.envs.alfworld.planner import commands_of, plan, wins
from lit_agentrl.envs.seeded import replay
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Split, WalkthroughSuite

log = logging.getLogger(__name__)

GAMES_KEPT = 512
"""Games of a process that stay read: each takes 0.3 MB, and some milliseconds to read again."""


class ALFWorldSuite(WalkthroughSuite):
    """The games of ALFWorld's published folders, or of `lit-agentrl make-alfworld-games`, in the benchmark's splits.

    Training plays `train`, validation `valid_seen` (known rooms, other placements) and test `valid_unseen` (unknown
    rooms). Every game is a task once, in a fixed order that mixes types and rooms. A split whose folder is missing has
    no tasks and is warned about. Files that cannot be played are left out, counted and named.

    Nothing has to be installed to play, and no planner runs: a game is read once, in milliseconds, and its episodes
    share it (see `lit_agentrl.envs.alfworld.game`).

    Args:
        data: The folder that holds the splits; by default $ALFWORLD_DATA.
        task_types: The types to play, of pick_and_place, look_at_obj_in_light, pick_clean_then_place_in_recep,
            pick_heat_then_place_in_recep, pick_cool_then_place_in_recep and pick_two_obj_and_place; all by default.
        max_games: At most so many games of each split; all by default.
        action_format: What a reply has to look like: the command alone ("plain"), or in action tags ("tagged").
        commands: List the admissible commands in every observation's text.
        validity: What makes an action `valid`: that it is an admissible command ("admissible"), or that the reply has
            the right format, whatever the command ("format", as in GiGPO's experiments).
        text_release: Speak the commands of data release 2.1.1 (put X in/on Y) or 2.1.2 (move X to Y); by default those
            of the files.
        reward: What winning pays; everything else pays 0.

    Raises:
        UserError: There is no data, or an argument is unknown or out of range.
    """

    def __init__(
        self,
        data: str | None = None,
        task_types: Sequence[str] = tuple(KINDS.values()),
        max_games: int | None = None,
        action_format: ActionFormat = "plain",
        commands: bool = True,
        validity: Validity = "admissible",
        text_release: TextRelease = "file",
        reward: float = 10.0,
    ) -> None:
        check_action_format(action_format)
        if unknown := [kind for kind in task_types if kind not in KINDS.values()]:
            raise UserError(f"task_types: {', '.join(unknown)} unknown; allowed are {', '.join(KINDS.values())}.")
        if not task_types:
            raise UserError("task_types is empty: name at least one type, or leave it out for all six.")
        if max_games is not None and max_games < 1:
            raise UserError(f"max_games={max_games}: a split needs at least 1 game; leave it out for all.")
        if validity not in ("admissible", "format"):
            raise UserError(f"validity={validity!r} is unknown; allowed are admissible and format.")
        if text_release not in ("file", "2.1.1", "2.1.2"):
            raise UserError(f"text_release={text_release!r} is unknown; allowed are file, 2.1.1 and 2.1.2.")
        if not 0 < reward < math.inf:
            raise UserError(f"reward={reward}: winning has to pay more than 0.")
        self._root = find_data(data)
        self._types = frozenset(task_types)
        self._max_games = max_games
        self._release: TextRelease = text_release
        self._display = Display(action_format, commands, validity, reward)
        self._tasks: dict[Split, list[str]] = {}

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's games: their folders' paths, relative to the data.

        Raises:
            UserError: The split is unknown, no game of its folder can be played, or made games lie among real ones.
        """
        if split not in self._tasks:
            if split not in FOLDERS:
                raise UserError(f"split={split!r} is unknown; allowed are {', '.join(FOLDERS)}.")
            self._tasks[split] = self._list(split)
        return self._tasks[split]

    def make(self, task: str) -> ALFWorldEnvironment:
        """A fresh episode of the game."""
        return ALFWorldEnvironment(_open_game(self._path(task), self._release), self._display)

    def kind(self, task: str) -> str:
        """The type of the task, one of six."""
        self._path(task)
        return task_kind(task) or ""

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """A play that wins: the file's own where it has one that works, else a planned one.

        Args:
            task: The game.
            held_out: Allow a game that is not of the train split.

        Raises:
            UserError: The game cannot be won, or it is held out and `held_out` is False, so that no demonstration
                leaks by accident.
        """
        path = self._path(task)
        if not held_out and not task.startswith("train/"):
            raise UserError(f"task={task!r} is held out: training on its walkthrough would void the evaluation.")
        return replay(self.make(task), _solution(path, self._release), self._display.action_format)

    def _path(self, task: str) -> Path:
        """The file of a task, which may come from outside: nothing but a game below the data is opened."""
        parts = task.split("/")
        path = self._root / task / GAME
        if len(parts) != 3 or parts[0] not in FOLDERS.values() or {"", ".", ".."} & {*parts} or not path.is_file():
            raise UserError(
                f"task={task!r} is not a game of {self._root}; a task looks like 'train/TASK/trial_T...', and has a "
                f"file {GAME}."
            )
        return path

    def _list(self, split: Split) -> list[str]:
        folder = self._root / FOLDERS[split]
        if not folder.is_dir():
            log.warning("alfworld: the %s split has no tasks, as there is no folder %s", split, folder)
            return []
        return playable_games(self._root, split, self._types, self._max_games)


def _read(path: Path, release: TextRelease) -> GameText:
    return in_release(read_game(path), release, path)


@lru_cache(maxsize=GAMES_KEPT)
def _open_game(path: Path, release: TextRelease) -> ALFWorldGame:
    """The game of a file. Threads may read the same at once: the results are equal, and the last stays."""
    text = _read(path, release)
    try:
        return ALFWorldGame(text.domain, text.grammar, text.problem)
    except (PddlError, GrammarError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BrokenGame(f"{path} cannot be played: {error}. Download or make it again.") from None


@lru_cache(maxsize=GAMES_KEPT)
def _solution(path: Path, release: TextRelease) -> tuple[str, ...]:
    """Commands that win the game, the file's own or planned."""
    game, stored = _open_game(path, release), _read(path, release).walkthrough
    if stored and wins(game, stored):
        return stored
    moves = plan(game)
    if moves is None:
        raise BrokenGame(f"{path} cannot be won: no plan was found.")
    return commands_of(game, moves)
