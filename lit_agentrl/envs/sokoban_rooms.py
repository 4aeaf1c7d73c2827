"""Sokoban boards from seeds: solvable by construction, because they are played backwards from the solved room.

A room is carved by a random walk. From all its solved states at once, a breadth-first search over backward moves (a box
is pulled, never pushed) gives every state within reach and the exact length of its shortest solution, so boards of a
wanted length are picked, not hoped for. `sokoban_solver` finds the same lengths forwards, by other means.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lit_agentrl.envs.sokoban_boards import Room, State, digest
from lit_agentrl.envs.sokoban_solver import solve
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

ROOMS_PER_SEED = 500  # tried before the options are said to allow no board
PICKS_PER_ROOM = 20


@dataclass(frozen=True, slots=True)
class BoardOptions:
    """What boards to make."""

    size: int
    """Rows and columns, the border included."""
    num_boxes: int
    min_moves: int
    """The fewest moves that a shortest solution may have."""
    max_moves: int
    max_search: int
    """States that one search may look at."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A board and a shortest solution of it."""

    room: Room
    start: State
    solution: tuple[str, ...]


def board_split(board_digest: str) -> Split:
    """The one split that may have a board: 3/5 of all boards train, 1/5 val, 1/5 test."""
    share = int(board_digest, 16) % 5
    return "val" if share == 3 else "test" if share == 4 else "train"


def make_puzzle(seed: int, split: Split, options: BoardOptions) -> Puzzle:
    """The board of a seed, from those of the split.

    Raises:
        UserError: No such board is among the many that were tried.
    """
    rng = random.Random(seed)
    for _ in range(ROOMS_PER_SEED):
        room = _carve(rng, options.size, options.num_boxes)
        layers = _play_backwards(room, options)
        if not layers:
            continue
        for _ in range(PICKS_PER_ROOM):
            moves = rng.choice(sorted(layers))
            start = rng.choice(layers[moves])
            if board_split(digest(room, start)) == split:
                solution = solve(room, start, options.max_search)
                if solution is None:  # the search ran into its limit: too hard a board to promise anything about
                    break
                assert len(solution) == moves
                return Puzzle(room, start, tuple(solution))
    raise UserError(
        f"No Sokoban board was found in {ROOMS_PER_SEED} rooms of size={options.size} with num_boxes="
        f"{options.num_boxes}, {options.min_moves} to {options.max_moves} moves and max_search={options.max_search}. "
        "Lower min_moves, or raise size, max_moves or max_search."
    )


def _carve(rng: random.Random, size: int, num_boxes: int) -> Room:
    """A connected room of between half and nine tenths of the space within the border."""
    space = (size - 2) ** 2
    num_floor = max(2 * num_boxes + 1, round(space * rng.uniform(0.5, 0.9)))
    cell = rng.randrange(1, size - 1) * size + rng.randrange(1, size - 1)
    floor = {cell}
    while len(floor) < num_floor:
        after = cell + rng.choice((-size, size, -1, 1))
        if all(0 < line < size - 1 for line in divmod(after, size)):
            cell = after
            floor.add(cell)
    return Room(size, size, frozenset(floor), frozenset(rng.sample(sorted(floor), num_boxes)))


def _play_backwards(room: Room, options: BoardOptions) -> dict[int, list[State]]:
    """States by the length of their shortest solution, in the wanted range, with no box on a target yet."""
    layer = [State(player, room.targets) for player in sorted(room.floor - room.targets)]
    seen, found = set(layer), {}
    for moves in range(1, options.max_moves + 1):
        before = [
            state for after in layer for step in room.moves.values() for state in _predecessors(room, after, step)
        ]
        layer = [state for state in dict.fromkeys(before) if state not in seen]
        seen.update(layer)
        starts = [state for state in layer if not state.boxes & room.targets]
        if starts and moves >= options.min_moves:
            found[moves] = starts
        if len(seen) > options.max_search:
            break
    return found


def _predecessors(room: Room, state: State, step: int) -> list[State]:
    """The states from which `step` leads to `state`: the player just walked, or pushed the box that is ahead."""
    origin, ahead = state.player - step, state.player + step
    if origin not in room.floor or origin in state.boxes:
        return []
    walked = State(origin, state.boxes)
    if ahead not in state.boxes:
        return [walked]
    return [walked, State(origin, state.boxes - {ahead} | {state.player})]
