"""What a question can be about: things, their facts, and the links from one to another."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fact:
    """A value and the passage that states it."""

    answers: tuple[str, ...]
    """The value, as the passage writes it, then its other spellings."""
    gold: str
    clue: bool = False
    """Whether the value belongs to this entity alone, so that it can stand for it."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one entity to exactly one other."""

    target: str
    gold: tuple[str, ...]
    """The passages that are needed to go it, in the order of reading."""


@dataclass(slots=True)
class Entity:
    """A country or a chemical element."""

    id: str
    kind: str
    """`country` or `element`."""
    mention: str
    """How a question names it, with its article."""
    names: tuple[str, ...]
    """What counts as naming it in an answer."""
    facts: dict[str, Fact] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    sizes: dict[str, tuple[float, str]] = field(default_factory=dict)
    """What can be compared: a number and the passage that states it."""
