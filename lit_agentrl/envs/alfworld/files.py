"""ALFWorld's games on disk: `SPLIT/TASK/trial_*/game.tw-pddl`, each a JSON file with rules, texts, start and goal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

TextRelease = Literal["file", "2.1.1", "2.1.2"]

GAME = "game.tw-pddl"
FOLDERS: dict[Split, str] = {"train": "train", "val": "valid_seen", "test": "valid_unseen"}
KINDS = {
    "pick_and_place_simple": "pick_and_place",
    "look_at_obj_in_light": "look_at_obj_in_light",
    "pick_clean_then_place_in_recep": "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep": "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep": "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place": "pick_two_obj_and_place",
}
"""The six types of tasks, by the first part of their folders' names."""
MADE_BY = "made_by"
"""The key by which files of `lit-agentrl make-alfworld-games` say that they are no files of the benchmark."""

_OLD_COMMAND, _NEW_COMMAND = "put {o} in/on {r}", "move {o} to {r}"
_ARRIVALS = "You arrive at {lend.name}.", "You arrive at {r.name}."
_HELP = (
    "Download ALFWorld's games with its own `alfworld-download` (pip install alfworld; data under its licence), and "
    "give the folder that holds train, valid_seen and valid_unseen (json_2.1.1), or set ALFWORLD_DATA; or make games "
    "of the same format with `lit-agentrl make-alfworld-games FOLDER`."
)


class BrokenGame(UserError):
    """A game file that cannot be played."""


@dataclass(frozen=True, slots=True)
class GameText:
    """What a game file holds."""

    domain: str
    grammar: str
    problem: str
    walkthrough: tuple[str, ...]
    """Commands that win; empty where the file has none."""
    made_by: str
    """Who made up the game; empty for a file of the benchmark."""

    @property
    def release(self) -> TextRelease:
        """The release whose commands the texts speak: 2.1.2 replaced `put X in/on Y` by `move X to Y`."""
        return "2.1.1" if _OLD_COMMAND in self.grammar else "2.1.2"


def find_data(data: str | None) -> Path:
    """The folder that holds the splits: the one given, else $ALFWORLD_DATA, or `json_2.1.1` in it.

    Raises:
        UserError: There is no folder, or no split in it.
    """
    given = data or os.environ.get("ALFWORLD_DATA")
    if not given:
        raise UserError(f"ALFWorldSuite has no data: neither `data` nor the variable ALFWORLD_DATA is set. {_HELP}")
    root = Path(given).expanduser()
    for folder in (root, root / "json_2.1.1"):
        if any((folder / name).is_dir() for name in FOLDERS.values()):
            return folder.resolve()
    what = "holds no folder train, valid_seen or valid_unseen" if root.is_dir() else "is not a folder"
    raise UserError(f"data={given!r} {what}. Expected are files {{split}}/TASK/trial_*/{GAME}. {_HELP}")


def game_tasks(root: Path, split: Split) -> Iterator[str]:
    """The ids of all games of a split: their folders, relative to `root`.

    In the order of a hash: sorted by name, the first games would all be of one type and a few floor plans.
    """
    paths = (root / FOLDERS[split]).glob(f"*/*/{GAME}")
    tasks = [path.parent.relative_to(root).as_posix() for path in paths]
    return iter(sorted(tasks, key=lambda task: hashlib.sha256(task.encode()).digest()))


def task_kind(task: str) -> str | None:
    """The type of a game by the name of its folder; None for the kinds that ALFWorld leaves out.

    Those are the tasks of ALFRED with sliced objects and with movable receptacles, as in ALFWorld's own loader.
    """
    parts = task.split("/")
    if len(parts) != 3 or "movable" in task or "Sliced" in task:
        return None
    return KINDS.get(parts[1].split("-")[0])


def read_game(path: Path) -> GameText:
    """A game file.

    Raises:
        BrokenGame: It cannot be read, lacks something, or is marked as unsolvable.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenGame(f"{path} is not a readable JSON file: {error}. Download or make it again.") from None
    if not isinstance(content, dict):
        raise BrokenGame(f"{path} is not an ALFWorld game: its JSON is no object.")
    domain, grammar, problem = (content.get(key) for key in ("pddl_domain", "grammar", "pddl_problem"))
    if not (isinstance(domain, str) and isinstance(grammar, str) and isinstance(problem, str)):
        raise BrokenGame(f"{path} is not an ALFWorld game: it lacks pddl_domain, grammar or pddl_problem.")
    if content.get("solvable") is not True:
        raise BrokenGame(f"{path} is marked as unsolvable, or was never checked (`solvable` is not true).")
    walkthrough = content.get("walkthrough") or []
    if not isinstance(walkthrough, list) or not all(isinstance(command, str) for command in walkthrough):
        raise BrokenGame(f"{path}: its walkthrough is not a list of commands.")
    return GameText(domain, grammar, problem, tuple(walkthrough), str(content.get(MADE_BY, "")))


def in_release(text: GameText, release: TextRelease, path: Path) -> GameText:
    """The game with the commands of a data release; `file` leaves them as they are.

    From 2.1.1 to 2.1.2 the published patch changes `put X in/on Y` to `move X to Y`, and "You arrive at loc 20." to the
    name of the receptacle. (It adds a command `help`, too, which tells the policy nothing and is left out here.)

    Raises:
        BrokenGame: A game of the newer release was asked for in the older one.
    """
    if release in ("file", text.release):
        return text
    if release == "2.1.1":
        raise BrokenGame(f"{path} is written in the commands of release 2.1.2: use text_release: 2.1.2, or file.")
    grammar = text.grammar.replace(_OLD_COMMAND, _NEW_COMMAND).replace(*_ARRIVALS)
    walkthrough = tuple(_renewed(command) for command in text.walkthrough)
    return GameText(text.domain, grammar, text.problem, walkthrough, text.made_by)


def _renewed(command: str) -> str:
    if command.startswith("put ") and " in/on " in command:
        return "move " + command.removeprefix("put ").replace(" in/on ", " to ", 1)
    return command
