"""Sokoban's rules, and its boards as text. A cell is a number, row * width + column; the border is wall."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WALL, FLOOR, TARGET, BOX, PLAYER, BOX_ON_TARGET, PLAYER_ON_TARGET = "#_OXP√S"
ACTIONS = ("up", "down", "left", "right")


@dataclass(frozen=True, slots=True)
class Room:
    """What does not change: where one can stand, and where the boxes belong."""

    height: int
    width: int
    floor: frozenset[int]
    """Cells that are not wall, targets included."""
    targets: frozenset[int]

    @property
    def moves(self) -> dict[str, int]:
        """What each action adds to a cell."""
        return dict(zip(ACTIONS, (-self.width, self.width, -1, 1), strict=True))


@dataclass(frozen=True, slots=True)
class State:
    """What moves."""

    player: int
    boxes: frozenset[int]


def move(room: Room, state: State, step: int) -> State:
    """The state after a step in one of `room.moves`; the same state where the way is blocked."""
    ahead, behind = state.player + step, state.player + 2 * step
    if ahead not in room.floor:
        return state
    if ahead not in state.boxes:
        return State(ahead, state.boxes)
    if behind not in room.floor or behind in state.boxes:
        return state
    return State(ahead, state.boxes - {ahead} | {behind})


def is_solved(room: Room, state: State) -> bool:
    """Whether every box is on a target."""
    return state.boxes <= room.targets


def push_distances(room: Room) -> dict[int, int]:
    """Pushes that a box alone in the room needs from each cell to its nearest target.

    From a cell that is not a key, no target can be reached: a corner, or a wall without a target.
    """
    distances = dict.fromkeys(room.targets, 0)
    queue = sorted(room.targets)
    for cell in queue:
        for step in room.moves.values():
            before, player = cell - step, cell - 2 * step  # a box pushed to `cell` came from `before`
            if before in room.floor and player in room.floor and before not in distances:
                distances[before] = distances[cell] + 1
                queue.append(before)
    return distances


def render(room: Room, state: State) -> list[str]:
    """The rows of the board, a symbol a cell."""
    cells = [symbol(room, state, cell) for cell in range(room.height * room.width)]
    return ["".join(cells[start : start + room.width]) for start in range(0, len(cells), room.width)]


def symbol(room: Room, state: State, cell: int) -> str:
    """What is on a cell."""
    on_target = cell in room.targets
    if cell not in room.floor:
        return WALL
    if cell in state.boxes:
        return BOX_ON_TARGET if on_target else BOX
    if cell == state.player:
        return PLAYER_ON_TARGET if on_target else PLAYER
    return TARGET if on_target else FLOOR


def parse_board(rows: Sequence[str]) -> tuple[Room, State]:
    """The board that `render` shows as `rows`."""
    width, cells = len(rows[0]), "".join(rows)
    found = {name: frozenset(i for i, cell in enumerate(cells) if cell == name) for name in set(cells)}

    def where(*symbols: str) -> frozenset[int]:
        return frozenset().union(*(found.get(name, frozenset()) for name in symbols))

    room = Room(
        len(rows), width, frozenset(range(len(cells))) - where(WALL), where(TARGET, BOX_ON_TARGET, PLAYER_ON_TARGET)
    )
    (player,) = where(PLAYER, PLAYER_ON_TARGET)
    return room, State(player, where(BOX, BOX_ON_TARGET))


def digest(room: Room, state: State) -> str:
    """A hash that two boards share exactly if one is the other, shifted, turned or mirrored."""
    rows = _cropped(_cropped(render(room, state)))
    views = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]  # a quarter turn
        views += ["\n".join(rows), "\n".join(reversed(rows))]
    return hashlib.sha256(min(views).encode()).hexdigest()


def _cropped(rows: Iterable[str]) -> list[str]:
    """Without the rows that are all wall, and turned over: twice crops both ways."""
    kept = [row for row in rows if set(row) != {WALL}]
    return ["".join(column) for column in zip(*kept, strict=True)]
