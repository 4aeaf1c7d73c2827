"""PDDL, as far as ALFWorld's games use it: typed objects, and conditions made of and, or, not, exists, = and facts.

A condition becomes a list of alternatives (its disjunctive normal form), each a plain conjunction: that is what can be
matched against facts. Everything is in lower case, as PDDL does not know the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

Fact = tuple[str, ...]
"""A predicate and its arguments. In a condition an argument that starts with `?` is a variable."""
Tree = str | list["Tree"]

ANYTHING = "object"
"""The type of everything."""


class PddlError(ValueError):
    """The text is not PDDL, or uses what ALFWorld's games do not."""


@dataclass(frozen=True, slots=True)
class Conjunction:
    """Facts that must hold and facts that must not, over variables of given types."""

    positive: tuple[Fact, ...] = ()
    negative: tuple[Fact, ...] = ()
    """The predicate `=` compares its two arguments."""
    types: tuple[tuple[str, str], ...] = ()
    """The variables that `exists` binds inside, with their types."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What comes to hold and what ceases to, where one of `when` held before."""

    added: tuple[Fact, ...]
    deleted: tuple[Fact, ...]
    when: tuple[Conjunction, ...] = (Conjunction(),)


@dataclass(frozen=True, slots=True)
class Action:
    """A kind of action."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    """Variables with their types, in order."""
    alternatives: tuple[Conjunction, ...]
    """One of them must hold."""
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """The rules of a game."""

    parents: dict[str, str]
    """The type above each type."""
    constants: dict[str, str]
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Where a game starts and how it is won."""

    types: dict[str, str]
    """The type of each object."""
    facts: frozenset[Fact]
    goal: tuple[Conjunction, ...]


@lru_cache(maxsize=8)
def read_domain(text: str) -> Domain:
    """The rules. ALFWorld's games share a few texts, so they are kept.

    Raises:
        PddlError: The text cannot be read.
    """
    sections = _sections(text)
    types = _typed(_one(sections, ":types"))
    actions = tuple(_action(section) for section in sections if section[0] == ":action")
    return Domain(dict(types), dict(_typed(_one(sections, ":constants"))), actions)


def read_problem(text: str) -> Problem:
    """The start and the goal.

    Raises:
        PddlError: The text cannot be read.
    """
    sections = _sections(text)
    facts = frozenset(_fact(tree) for tree in _one(sections, ":init") if tree[0] != "=")
    goal = _one(sections, ":goal")
    if len(goal) != 1:
        raise PddlError(f"a problem has one goal, this one {len(goal)}")
    return Problem(dict(_typed(_one(sections, ":objects"))), facts, tuple(_alternatives(goal[0])))


def _sections(text: str) -> list[list[Tree]]:
    """The parts of `(define ...)`."""
    # ALFWorld's rules say `(exists (?l - location, ?r - receptacle)`. PDDL knows no commas, so this is a type
    # `location,` without members, and the planner never fulfils it: things can be examined in hand only. Kept so.
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text).lower())
    stack: list[list[Tree]] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                break  # real games close a parenthesis too many after the goal
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) > 1 or not stack[0] or not isinstance(stack[0][0], list) or stack[0][0][:1] != ["define"]:
        raise PddlError("it is not one closed `(define ...)`")
    return [section for section in stack[0][0][1:] if isinstance(section, list) and section]


def _one(sections: Sequence[list[Tree]], name: str) -> list[Tree]:
    return next((section[1:] for section in sections if section[0] == name), [])


def _typed(words: Sequence[Tree]) -> Iterator[tuple[str, str]]:
    """Names with their types: `a b - t` gives (a, t), (b, t); a name without a type is an object."""
    waiting: list[str] = []
    names = iter(words)
    for word in names:
        if not isinstance(word, str):
            raise PddlError(f"a name was expected, not {word}")
        if word == "-":
            kind = next(names, None)
            if not isinstance(kind, str):
                raise PddlError(f"a type was expected after {waiting}")
            yield from ((name, kind) for name in waiting)
            waiting = []
        else:
            waiting.append(word)
    yield from ((name, ANYTHING) for name in waiting)


def _fact(tree: Tree) -> Fact:
    if not isinstance(tree, list) or not tree or not all(isinstance(word, str) for word in tree):
        raise PddlError(f"a fact was expected, not {tree}")
    return tuple(str(word) for word in tree)


def _action(section: list[Tree]) -> Action:
    name, fields = section[1], dict(zip(section[2::2], section[3::2], strict=True)) if len(section) % 2 == 0 else {}
    parameters, effect = fields.get(":parameters"), fields.get(":effect")
    if not isinstance(name, str) or not isinstance(parameters, list) or not isinstance(effect, list):
        raise PddlError(f"action {name} has no parameters or no effect")
    conditions = tuple(_alternatives(fields.get(":precondition", [])))
    return Action(name, tuple(_typed(parameters)), conditions, tuple(_effects(effect)))


@dataclass(slots=True)
class _Parts:
    added: list[Fact] = field(default_factory=list)
    deleted: list[Fact] = field(default_factory=list)


def _effects(tree: list[Tree]) -> Iterator[Effect]:
    """The unconditional effects in one, then each `when`."""
    always = _Parts()
    for part in tree[1:] if tree[:1] == ["and"] else [tree]:
        if not isinstance(part, list) or not part or part[0] == "increase":
            continue  # costs do not change what can be done
        if part[0] == "when":
            condition, consequence = part[1:]
            if not isinstance(consequence, list):
                raise PddlError(f"an effect was expected, not {consequence}")
            (inner,) = _effects(consequence)
            yield Effect(inner.added, inner.deleted, tuple(_alternatives(condition)))
        elif part[0] == "not":
            always.deleted.append(_fact(part[1]))
        else:
            always.added.append(_fact(part))
    yield Effect(tuple(always.added), tuple(always.deleted))


def _alternatives(tree: Tree) -> list[Conjunction]:
    """The disjunctive normal form of a condition."""
    if not isinstance(tree, list):
        raise PddlError(f"a condition was expected, not {tree}")
    if not tree:
        return [Conjunction()]
    head, rest = tree[0], tree[1:]
    if head == "and":
        return [_joined(choice) for choice in product(*map(_alternatives, rest))]
    if head == "or":
        return [alternative for part in rest for alternative in _alternatives(part)]
    if head == "exists":
        variables = tuple(_typed(rest[0])) if isinstance(rest[0], list) else ()
        inner = _alternatives(rest[1])
        return [Conjunction(c.positive, c.negative, (*variables, *c.types)) for c in inner]
    if head == "not" and isinstance(rest[0], list) and rest[0][0] not in ("and", "or", "not", "exists", "forall"):
        return [Conjunction(negative=(_fact(rest[0]),))]
    if head in ("not", "forall", "imply", "="):
        raise PddlError(f"`{head}` of this kind is not supported: {tree}")
    return [Conjunction(positive=(_fact(tree),))]


def _joined(parts: Sequence[Conjunction]) -> Conjunction:
    names = [name for part in parts for name, _ in part.types]
    clash = {name for name in names if names.count(name) > 1}
    renamed = [_renamed(part, clash, index) for index, part in enumerate(parts)] if clash else parts
    return Conjunction(
        tuple(fact for part in renamed for fact in part.positive),
        tuple(fact for part in renamed for fact in part.negative),
        tuple(variable for part in renamed for variable in part.types),
    )


def _renamed(part: Conjunction, clash: set[str], index: int) -> Conjunction:
    """The same with other names for the variables that a sibling's `exists` binds as well."""
    names = {name: f"{name}.{index}" for name, _ in part.types if name in clash}

    def rename(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
        return tuple(tuple(names.get(word, word) for word in fact) for fact in facts)

    types = tuple((names.get(name, name), kind) for name, kind in part.types)
    return Conjunction(rename(part.positive), rename(part.negative), types)
