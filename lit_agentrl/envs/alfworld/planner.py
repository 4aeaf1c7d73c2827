"""Plans that win a game: greedy search by the length of relaxed plans (FF: Hoffmann and Nebel 2001, arXiv:1106.0675).

In the relaxed game nothing that held ceases to hold. It is quickly solved, its plan says how far the goal is and which
actions lead towards it, and where it cannot be solved the game cannot be won. Fast Downward, ALFWorld's planner,
searches for shortest plans and takes over a minute on some games; these plans are sometimes a step or two longer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from lit_agentrl.envs.alfworld.game import ALFWorldGame, Move, is_noop
from lit_agentrl.envs.alfworld.matching import Facts, World, grounded
from lit_agentrl.envs.alfworld.pddl import Conjunction, Fact

MOST_STATES = 5000
"""States looked at before the search gives up. Real games take under a hundred."""
_GOAL: Fact = ("goal",)


@dataclass(slots=True, eq=False)
class _Operator:
    """A move with the facts that it needs and adds; the goal's alternatives are operators without a move."""

    move: Move | None
    needs: tuple[Fact, ...]  # sorted, as all that is gone through here: a set's order differs between processes
    refuses: frozenset[Fact]
    adds: tuple[Fact, ...]


def plan(game: ALFWorldGame, start: Facts | None = None) -> list[Move] | None:
    """Moves that win the game from `start`, by default its beginning; None where none were found."""
    return Planner(game).plan(game.start if start is None else start)


def commands_of(game: ALFWorldGame, moves: Sequence[Move]) -> tuple[str, ...]:
    """The commands of moves made one after another from the game's beginning."""
    state, commands = game.start, []
    for move in moves:
        commands.append(game.command(state, move))
        state = game.apply(state, move)
    return tuple(commands)


def wins(game: ALFWorldGame, commands: Sequence[str]) -> bool:
    """Whether the commands, made one after another from the game's beginning, win it, the last one and none before."""
    state = game.start
    for command in commands:
        move = game.moves(state).get(command)
        if move is None or game.is_won(state):
            return False
        state = game.apply(state, move)
    return game.is_won(state)


class Planner:
    """Plans for one game.

    Args:
        game: The game.
    """

    def __init__(self, game: ALFWorldGame) -> None:
        self._game = game
        self._operators = _relevant(list(_operators(game)))
        self._needed_by: dict[Fact, list[int]] = {}
        for index, operator in enumerate(self._operators):
            for fact in operator.needs:
                self._needed_by.setdefault(fact, []).append(index)

    def plan(self, start: Facts) -> list[Move] | None:
        """Moves that win from `start`; None where none were found."""
        for helpful_only in (True, False):  # what only looks unhelpful is tried where the rest has led nowhere
            found = self._search(start, helpful_only)
            if found is not None:
                return found
        return None

    def _search(self, start: Facts, helpful_only: bool) -> list[Move] | None:
        """Best-first search: the state whose relaxed plan is shortest, then the one with the fewest moves behind it."""
        tickets = count()
        distance, moves = self._relaxed_plan(start)
        if distance is None:
            return None
        queue = [(distance, 0, next(tickets), start, moves)]
        paths: dict[frozenset[Fact], list[Move]] = {start.all: []}
        while queue and len(paths) < MOST_STATES:
            _, length, _, state, helpful = heapq.heappop(queue)
            path = paths[state.all]
            if self._game.is_won(state):
                return path
            for operator in helpful if helpful_only else self._operators:
                if operator.move is None or not state.all.issuperset(operator.needs) or operator.refuses & state.all:
                    continue
                after = self._game.apply(state, operator.move)
                if after.all in paths:
                    continue
                paths[after.all] = [*path, operator.move]
                distance, moves = self._relaxed_plan(after)
                if distance is not None:
                    heapq.heappush(queue, (distance, length + 1, next(tickets), after, moves))
        return None

    def _relaxed_plan(self, state: Facts) -> tuple[int | None, list[_Operator]]:
        """The number of moves of a plan in the relaxed game, and those of them that may be made at once."""
        cost: dict[Fact, int] = dict.fromkeys(state.all, 0)
        by: dict[Fact, _Operator] = {}
        missing = [len(operator.needs) for operator in self._operators]
        queue = [(0, index, fact) for index, fact in enumerate(sorted(state.all))]
        tickets = count(len(queue))
        queue += [(0, next(tickets), fact) for o in self._operators if not o.needs for fact in o.adds]
        total = [1] * len(missing)
        done: set[Fact] = set()
        while queue:
            _, _, fact = heapq.heappop(queue)
            if fact in done:
                continue
            done.add(fact)
            if fact == _GOAL:
                break
            for index in self._needed_by.get(fact, ()):
                missing[index] -= 1
                total[index] += cost[fact]
                if missing[index]:
                    continue
                for added in self._operators[index].adds:
                    if total[index] < cost.get(added, 1 << 30):
                        cost[added] = total[index]
                        by[added] = self._operators[index]
                        heapq.heappush(queue, (total[index], next(tickets), added))
        if _GOAL not in done:
            return None, []
        chosen: dict[int, _Operator] = {}
        wanted = [_GOAL]
        while wanted:
            operator = by.get(wanted.pop())
            if operator is not None and id(operator) not in chosen:
                chosen[id(operator)] = operator
                wanted.extend(operator.needs)
        steps = [operator for operator in chosen.values() if operator.move is not None]
        return len(steps), [operator for operator in steps if state.all.issuperset(operator.needs)]


def _operators(game: ALFWorldGame) -> Iterator[_Operator]:
    """All moves that the relaxed game comes to allow, and the goal."""
    world = game.world
    reached = set(game.start.all)
    found: dict[tuple[object, ...], _Operator] = {}
    grown = True
    while grown:
        now, size = Facts(reached), len(reached)
        for action in game.actions:
            for number, condition in enumerate(action.alternatives):
                relaxed = Conjunction(condition.positive, _settled(condition, world), condition.types)
                for binding in world.solutions(relaxed, dict(action.parameters), now, {}):
                    key = (action.name, number, *sorted(binding.items()))
                    if key in found or is_noop(action, condition, binding):
                        continue
                    adds = {grounded(fact, binding) for effect in action.effects for fact in effect.added}
                    move = Move(action, {name: binding[name] for name, _ in action.parameters})
                    found[key] = _operator(move, condition, binding, adds, world)
                    reached.update(adds)
        grown = len(reached) > size
    yield from found.values()
    for goal in game.goals:
        relaxed = Conjunction(goal.positive, _settled(goal, world), goal.types)
        for binding in world.solutions(relaxed, {}, Facts(reached), {}):
            yield _operator(None, goal, binding, {_GOAL}, world)


def _operator(
    move: Move | None, condition: Conjunction, binding: dict[str, str], adds: set[Fact], world: World
) -> _Operator:
    needs = {grounded(fact, binding) for fact in condition.positive if fact[0] in world.dynamic}
    refuses = frozenset(grounded(fact, binding) for fact in condition.negative if fact[0] in world.dynamic)
    return _Operator(move, tuple(sorted(needs)), refuses, tuple(sorted(adds)))


def _settled(condition: Conjunction, world: World) -> tuple[Fact, ...]:
    """The facts that must not hold and that no action changes: the relaxed game keeps those."""
    return tuple(fact for fact in condition.negative if fact[0] not in world.dynamic)


def _relevant(operators: list[_Operator]) -> list[_Operator]:
    """Those that may lead to the goal: all that add what one of them needs."""
    wanted, kept = {_GOAL}, dict.fromkeys(range(len(operators)), False)
    grown = True
    while grown:
        grown = False
        for index, operator in enumerate(operators):
            if not kept[index] and not wanted.isdisjoint(operator.adds):
                kept[index] = grown = True
                wanted.update(operator.needs)
    return [operator for index, operator in enumerate(operators) if kept[index]]
