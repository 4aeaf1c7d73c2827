"""Which games a split plays, and what is said about it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Set
from pathlib import Path

from lit_agentrl.envs.alfworld.files import FOLDERS, GAME, BrokenGame, game_tasks, read_game, task_kind
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

log = logging.getLogger(__name__)


def playable_games(root: Path, split: Split, kinds: Set[str], max_games: int | None) -> list[str]:
    """The tasks of a split, in their fixed order; what is left out is counted, and broken files are named.

    Raises:
        UserError: No game can be played, or made games lie among those of the benchmark.
    """
    makers: dict[str, str] = {}
    broken: list[str] = []
    left_out: Counter[str] = Counter()
    for task in game_tasks(root, split):
        kind = task_kind(task)
        if kind not in kinds:
            left_out["of other types" if kind else "of no ALFWorld type"] += 1
        elif len(makers) == max_games:
            left_out["beyond max_games"] += 1
        else:
            try:
                makers[task] = read_game(root / task / GAME).made_by
            except BrokenGame as error:
                broken.append(str(error))
    if broken:
        some = " ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
        log.warning("alfworld: %d game files of the %s split are left out: %s", len(broken), split, some)
    _check(root / FOLDERS[split], set(makers.values()), bool(makers), broken, left_out)
    _report(root / FOLDERS[split], split, makers, left_out)
    return list(makers)


def _check(folder: Path, makers: set[str], found: bool, broken: list[str], left_out: Counter[str]) -> None:
    if not found:
        why = [f"{len(broken)} broken"] * bool(broken) + [f"{count} {why}" for why, count in left_out.items()]
        raise UserError(
            f"No game of {folder} can be played (files found: {', '.join(why) or 'none'}). Widen task_types, or check "
            f"that the files are {folder.name}/TASK/trial_*/{GAME}. {' '.join(broken[:1])}"
        )
    if len(makers) > 1:
        raise UserError(
            f"{folder} holds made games ({', '.join(sorted(filter(None, makers)))}) among others: results would be of "
            "neither. Keep each kind in a folder of its own."
        )


def _report(folder: Path, split: Split, makers: dict[str, str], left_out: Counter[str]) -> None:
    made_by = next(iter(makers.values()))
    what = f"ALFWorld-format games made by {made_by}, not the benchmark's," if made_by else "ALFWorld games"
    counts = Counter(str(task_kind(task)) for task in makers)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    others = "".join(f"; left out: {count} {why}" for why, count in left_out.items())
    log.info("alfworld: the %s split plays %d %s from %s (%s)%s", split, len(makers), what, folder, kinds, others)
