"""`lit-agentrl make-alfworld-games`: games of ALFWorld's format where the benchmark cannot be downloaded.

Rooms, rules, texts, goals and what can lie where are those of the `alfworld` package. Which things lie where is
sampled, so these are not the benchmark's games, and every file says so. Each has been planned and played to its end.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_agentrl.envs.alfworld.files import GAME, KINDS
from lit_agentrl.envs.alfworld.floor_plans import UNSEEN_PLANS, floor_plans, read_tables
from lit_agentrl.envs.alfworld.game import ALFWorldGame
from lit_agentrl.envs.alfworld.planner import commands_of, plan, wins
from lit_agentrl.envs.alfworld.problem import MAKER, NOTICE, game_file, problem_text, task_sentence, trajectory_file
from lit_agentrl.envs.alfworld.sampling import Sample, sample_game
from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text

MARK = "made-by-lit-agentrl.json"
"""Says that a folder's games are ours to add to, and how they were made."""
MOST_GAMES = 100_000
_TRIES = 500  # rooms tried for one game; most types fit a quarter of them
_README = """# ALFWorld-format games, placements sampled

Made by `{maker} --num_train {num_train} --num_valid_seen {num_valid_seen} --num_valid_unseen {num_valid_unseen} \
--seed {seed}` with the tables of alfworld {alfworld} (MIT). {notice}: rooms, rules and texts are ALFWorld's
(Shridhar et al. 2021, arXiv:2010.03768), where things lie was sampled. Success on them says nothing about the
benchmark, and must not be reported as ALFWorld's.

A game of `valid_seen` uses the room of the `train` game of its number, with other placements; `valid_unseen` uses floor
plans {unseen}, which `train` never shows. Every game was won by its stored `walkthrough`.
"""


@dataclass(frozen=True)
class Counts:
    """How many games to make, and from what.

    Raises:
        UserError: A number is out of range.
    """

    num_train: int = 60
    num_valid_seen: int = 12
    num_valid_unseen: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_train", "num_valid_seen", "num_valid_unseen"):
            if not 0 <= getattr(self, name) <= MOST_GAMES:
                raise UserError(f"{name}={getattr(self, name)} is out of range: allowed are 0 to {MOST_GAMES}.")
        if self.num_valid_seen > self.num_train:
            raise UserError(
                f"num_valid_seen={self.num_valid_seen} is more than num_train={self.num_train}: each of its games "
                "takes the room of the training game of its number."
            )

    @property
    def splits(self) -> dict[str, int]:
        """Games of each folder."""
        return {"train": self.num_train, "valid_seen": self.num_valid_seen, "valid_unseen": self.num_valid_unseen}


def make_games(folder: Path, counts: Counts) -> int:
    """Write the games that are not there yet, one file after another; gives how many were written.

    A run that was stopped is continued by the same call. A game depends on the seed, its split and its number alone:
    asking for more adds to what is there.

    Raises:
        UserError: The folder holds something else, or games of other settings.
    """
    tables = read_tables()
    _claim(folder, counts, tables.version)
    written = 0
    for split, count in counts.splits.items():
        there, known = _rooms(folder / split), _rooms(folder / "train")
        for number in range(count):
            trial = f"trial_{counts.seed}_{number:05d}"
            if trial not in there:
                rooms = [known[trial]] if split == "valid_seen" else _rooms_of(split)
                task, name = list(KINDS)[number % len(KINDS)], f"{counts.seed}/{split}/{number}"
                _write(folder / split, trial, _samples(task, name, rooms))
                written += 1
    return written


def _rooms(folder: Path) -> dict[str, int]:
    """The floor plan of every game of a folder, by trial."""
    return {path.parent.name: int(path.parts[-3].rsplit("-")[-1]) for path in folder.glob(f"*/*/{GAME}")}


def _rooms_of(split: str) -> list[int]:
    """The floor plans that a split may use."""
    return [number for number in floor_plans() if (number in UNSEEN_PLANS) == (split == "valid_unseen")]


def _claim(folder: Path, counts: Counts, version: str) -> None:
    """Mark the folder as ours, or check that it is."""
    mark, settings = folder / MARK, {**asdict(counts), "alfworld": version}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not mark.is_file():
            raise UserError(f"{folder} is not empty, and {MAKER} did not make it: give a new folder.")
        try:
            before = dict(json.loads(mark.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{mark} is not readable: give a new folder.") from None
        for name in ("seed", "alfworld"):
            if before.get(name) != settings[name]:
                raise UserError(
                    f"{folder} was made with {name} {before.get(name)}, not {settings[name]}: games of both would mix. "
                    "Give a new folder."
                )
        for name in ("num_train", "num_valid_seen", "num_valid_unseen"):
            if int(before.get(name, 0)) > getattr(counts, name):
                raise UserError(
                    f"{folder} was made with {name}={before[name]}, more than the {getattr(counts, name)} asked for: "
                    "give a new folder, or ask for at least as many."
                )
    write_text(mark, json.dumps(settings, indent=1) + "\n")
    unseen = ", ".join(map(str, UNSEEN_PLANS))
    write_text(folder / "README.md", _README.format(maker=MAKER, notice=NOTICE, unseen=unseen, **settings))


def _write(folder: Path, trial: str, samples: Iterable[tuple[Sample, random.Random]]) -> None:
    """Write the first of the games that can be won."""
    tables = read_tables()
    for sample, rng in samples:
        sentence, problem = task_sentence(sample, tables, rng), problem_text(sample, tables)
        game = ALFWorldGame(tables.domain, tables.grammar.replace("UNKNOWN GOAL", sentence), problem)
        moves = None if game.is_won(game.start) else plan(game)
        if moves is None or not wins(game, commands := commands_of(game, moves)):
            continue
        title = f"{sample.task}-{sample.target}-None-{sample.goal}-{sample.plan.number}"
        write_text(folder / title / trial / "traj_data.json", trajectory_file(sample, sentence))
        # Last, as a game counts as made when this file is there.
        write_text(folder / title / trial / GAME, game_file(sample, tables, problem, sentence, commands))
        return
    raise UserError(f"No game for {folder.name}/{trial} was found in {_TRIES} tries: the floor plans do not allow it.")


def _samples(task: str, name: str, rooms: Sequence[int]) -> Iterator[tuple[Sample, random.Random]]:
    """Games to try, each with the generator that its words are drawn from."""
    for attempt in range(_TRIES):
        rng = random.Random(f"alfworld {name}/{attempt}")
        sample = sample_game(task, floor_plans()[rng.choice(rooms)], read_tables(), rng)
        if sample is not None:
            yield sample, rng


def main(options: list[str]) -> None:
    """`lit-agentrl make-alfworld-games OUTPUT [--num_train 60] [--num_valid_seen 12] [...]`."""
    parser = argparse.ArgumentParser("lit-agentrl make-alfworld-games", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder, or one to continue")
    for name, value in asdict(Counts()).items():
        what = "equal seeds make equal games" if name == "seed" else "games of the split"
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default: {value})")
    given = vars(parser.parse_args(options))
    folder = given.pop("output")
    written = make_games(folder, Counts(**given))
    print(f"{folder}: {written} games written, {sum(Counts(**given).splits.values())} in all. {NOTICE}.")
