"""The shortest solution of a Sokoban board, by A* over moves."""

from __future__ import annotations

from heapq import heappop, heappush

from lit_agentrl.envs.sokoban_boards import Room, State, is_solved, move, push_distances


def solve(room: Room, state: State, max_states: int) -> list[str] | None:
    """The fewest actions that put every box on a target; None where there are none within `max_states` states.

    The estimate of what is left, each box's pushes to its nearest target, never exceeds the truth and shrinks by one a
    move at most, so the first solution taken from the queue is a shortest one. A state with a box on a cell from which
    no target can be reached is left out.
    """
    pushes = push_distances(room)
    if any(box not in pushes for box in state.boxes):
        return None
    came_from: dict[State, tuple[State, str] | None] = {state: None}
    moves_to = {state: 0}
    queue = [(sum(pushes[box] for box in state.boxes), 0, state)]
    number, expanded = 0, set[State]()
    while queue and len(moves_to) <= max_states:
        _, _, current = heappop(queue)
        if is_solved(room, current):
            return _actions(came_from, current)
        if current in expanded:
            continue
        expanded.add(current)
        for action, step in room.moves.items():
            after, moves = move(room, current, step), moves_to[current] + 1
            if moves < moves_to.get(after, moves + 1) and all(box in pushes for box in after.boxes):
                moves_to[after], came_from[after] = moves, (current, action)
                number += 1  # the older of two equal states is taken first: the queue never compares states
                heappush(queue, (moves + sum(pushes[box] for box in after.boxes), number, after))
    return None


def _actions(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    actions = []
    while (origin := came_from[state]) is not None:
        state, action = origin
        actions.append(action)
    return actions[::-1]
