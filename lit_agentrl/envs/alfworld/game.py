"""A game of ALFWorld: where it starts, what may be done, what that changes, what is said, and when it is won.

TextWorld plays these games with a planner's C++ library, which must translate each of them first (seconds, at every
reset), keeps one state per copy of the library, and is not safe to share by threads. The rules are small, so they are
matched against the facts directly: a state is a value, a game is read in milliseconds and shared by all of its
episodes. The tests compare both, step by step, on real games.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lit_agentrl.envs.alfworld.grammar import ForEach, Grammar, GrammarError, read_grammar
from lit_agentrl.envs.alfworld.matching import Binding, Facts, World, grounded
from lit_agentrl.envs.alfworld.narrator import Narrator, display_names
from lit_agentrl.envs.alfworld.pddl import (
    ANYTHING,
    Action,
    Conjunction,
    Domain,
    Fact,
    Problem,
    read_domain,
    read_problem,
)

TAKEN_BACK = "not_"
"""What TextWorld writes before the predicate of a fact that an action has taken back. Its texts may ask for those."""

TASK = "Your task is to: "


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """An action on particular things."""

    action: Action
    binding: Binding


class ALFWorldGame:
    """Everything about a game that does not change while it is played. Safe to share by threads.

    Args:
        domain: The rules, in PDDL.
        grammar: The texts.
        problem: The start and the goal, in PDDL.

    Raises:
        PddlError: The rules or the problem cannot be read.
        GrammarError: The texts cannot be read.
    """

    def __init__(self, domain: str, grammar: str, problem: str) -> None:
        self._domain, self._problem = read_domain(domain), read_problem(problem)
        texts = read_grammar(grammar)
        self.actions = self._domain.actions
        if silent := [a.name for a in self.actions if a.name not in texts.commands or a.name not in texts.feedback]:
            raise GrammarError(f"it has no command or no feedback for the actions {', '.join(silent)}")
        types = {**self._domain.constants, **self._problem.types}
        changing = {f[0] for a in self.actions for e in a.effects for f in (*e.added, *e.deleted)}
        self._watched = _watched(texts)
        dynamic = frozenset(changing | {TAKEN_BACK + predicate for predicate in self._watched})
        facts = self._problem.facts
        self.world = World(_members(self._domain, types), Facts(f for f in facts if f[0] not in dynamic), dynamic)
        self.start = Facts(fact for fact in facts if fact[0] in dynamic)
        self._commands = texts.commands
        self._feedback = texts.feedback
        self._read = _read_predicates(self._domain, self._problem)
        names = display_names({argument for fact in facts for argument in fact[1:]})
        self._narrator = Narrator(texts, self.world, types, names)
        self._digest = hashlib.sha256("\0".join([domain, grammar, problem]).encode()).digest()
        self.task = self._narrator.produce("task", self.start, {}).removeprefix(TASK)
        """The goal, in words."""

    def moves(self, state: Facts) -> dict[str, Move]:
        """What may be done, by command, sorted."""
        found: dict[str, Move] = {}
        for action in self.actions:
            names = [name for name, _ in action.parameters]
            for condition in action.alternatives:
                for binding in self.world.solutions(condition, dict(action.parameters), state, {}):
                    if not is_noop(action, condition, binding):
                        known = {name: binding[name] for name in names}
                        move = Move(action, known)
                        found.setdefault(self.command(state, move), move)
        return dict(sorted(found.items()))

    def command(self, state: Facts, move: Move) -> str:
        """How a move is called."""
        return self._narrator.render(self._commands[move.action.name], state, move.binding)

    def apply(self, state: Facts, move: Move) -> Facts:
        """The state after a move that may be made."""
        added: set[Fact] = set()
        deleted: set[Fact] = set()
        for effect in move.action.effects:
            if any(self.world.solutions(condition, {}, state, move.binding) for condition in effect.when):
                added |= {grounded(fact, move.binding) for fact in effect.added}
                deleted |= {grounded(fact, move.binding) for fact in effect.deleted}
        deleted -= added
        for fact in [fact for fact in added if fact[0] in self._watched]:
            deleted.add((TAKEN_BACK + fact[0], *fact[1:]))
        added |= {(TAKEN_BACK + fact[0], *fact[1:]) for fact in deleted if fact[0] in self._watched}
        return Facts((state.all - deleted) | added)

    def intro(self) -> str:
        """The first text: the room, and the task."""
        return self._narrator.produce("intro", self.start, {})

    def feedback(self, state: Facts, move: Move) -> str:
        """What is said after a move has led to `state`."""
        return self._narrator.render(self._feedback[move.action.name], state, move.binding)

    def is_won(self, state: Facts) -> bool:
        """Whether the goal holds."""
        return any(self.world.solutions(goal, {}, state, {}) for goal in self.goals)

    @property
    def goals(self) -> tuple[Conjunction, ...]:
        """The goal; one of its alternatives must hold."""
        return self._problem.goal

    def key(self, state: Facts) -> str:
        """A hash of the game and of all facts that what can be done and won depends on.

        Not among them are marks that nothing asks for (`checked`: that something was looked at), and the places where
        a thing has once been.
        """
        facts = sorted(fact for fact in state.all if fact[0] in self._read)
        text = "\n".join(" ".join(fact) for fact in facts)
        return hashlib.sha256(self._digest + text.encode()).hexdigest()[:32]


def is_noop(action: Action, condition: Conjunction, binding: Mapping[str, str]) -> bool:
    """Whether the action restores what its condition says, as going to where one is: the planner drops those."""
    if len(action.effects) > 1:
        return False
    held = {grounded(fact, binding) for fact in condition.positive}
    (effect,) = action.effects
    added = {grounded(fact, binding) for fact in effect.added}
    deleted = {grounded(fact, binding) for fact in effect.deleted} - added
    return added <= held and deleted <= {grounded(fact, binding) for fact in condition.negative}


def _members(domain: Domain, types: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """The objects of each type, subtypes included."""
    members: dict[str, set[str]] = {ANYTHING: set(types)}
    for thing, kind in types.items():
        above: str | None = kind
        seen: set[str] = set()
        while above and above not in seen:
            members.setdefault(above, set()).add(thing)
            seen.add(above)
            above = domain.parents.get(above)
    return {kind: frozenset(things) for kind, things in members.items()}


def _watched(texts: Grammar) -> frozenset[str]:
    """The predicates whose taken-back facts some text asks for."""
    queries = [rule.condition for rules in texts.productions.values() for rule in rules]
    symbols = [symbol for rules in texts.productions.values() for rule in rules for symbol in rule.symbols]
    queries += [symbol.query for symbol in symbols if isinstance(symbol, ForEach)]
    return frozenset(p.removeprefix(TAKEN_BACK) for query in queries for p, _ in query if p.startswith(TAKEN_BACK))


def _read_predicates(domain: Domain, problem: Problem) -> frozenset[str]:
    """The predicates that a condition or the goal asks for."""
    conditions = [condition for action in domain.actions for condition in action.alternatives]
    conditions += [condition for action in domain.actions for effect in action.effects for condition in effect.when]
    conditions += problem.goal
    return frozenset(fact[0] for c in conditions for fact in (*c.positive, *c.negative))
