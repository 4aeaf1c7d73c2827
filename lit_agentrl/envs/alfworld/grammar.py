"""The texts of a game: ALFWorld's grammar, read and derived without running any of it.

A grammar (`.twl2`) names productions, each with alternatives under conditions, and gives every kind of action a command
template and a feedback text. TextWorld's own engine hands the expressions in it to Python's `eval`; game files come
from anywhere, so this reads the few forms that are used (`{o.name}`, `{r.name or r.id}`, `{o.indefinite + ' ' +
o.name}`) and refuses everything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Query = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
"""Facts that must hold, in order: a predicate, and its variables with their types. `not_` before it asks for facts that
an action has taken back."""

Term = tuple[str, str]
"""A variable and what of it to say; an empty variable before a quoted text."""


class GrammarError(ValueError):
    """The text is no grammar of ALFWorld."""


@dataclass(frozen=True, slots=True)
class Words:
    """Text as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Production:
    """The text of another production."""

    name: str


@dataclass(frozen=True, slots=True)
class Expression:
    """The first of the alternatives that says something; an alternative is terms in a row."""

    alternatives: tuple[tuple[Term, ...], ...]


@dataclass(frozen=True, slots=True)
class ForEach:
    """`said`, once for every way to fulfil the query (once, without one); separated as a list if it is one."""

    said: Expression | Production
    query: Query
    is_list: bool


Symbol = Words | Production | ForEach
Symbols = tuple[Symbol, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One alternative of a production."""

    condition: Query
    symbols: Symbols


@dataclass(frozen=True, slots=True)
class Grammar:
    """All texts of a game."""

    productions: dict[str, tuple[Rule, ...]]
    commands: dict[str, Symbols]
    """The command of each kind of action, by its name in lower case."""
    feedback: dict[str, Symbols]


_FIELD = re.compile(r'(template|feedback|pddl|grammar)\s*::\s*(?:"""(.*?)"""|"(.*?)")\s*;\s*', re.DOTALL)
_OPEN = re.compile(r"action\s+([\w/-]+)\s*\{\s*")
_SPACE = re.compile(r"(?:\s+|#[^\n]*\n)*")


@lru_cache(maxsize=512)
def read_grammar(text: str) -> Grammar:
    """The texts of a game.

    Raises:
        GrammarError: The text cannot be read.
    """
    productions: dict[str, Any] = {}
    commands: dict[str, Symbols] = {}
    feedback: dict[str, Symbols] = {}
    for action, field, content in _fields(text):
        if field == "template":
            commands[action] = read_symbols(content)
        elif field == "feedback":
            feedback[action] = read_symbols(content)
        elif field == "grammar":
            try:
                productions |= json.loads("\n".join(s for s in content.split("\n") if not s.lstrip().startswith("#")))
            except ValueError as error:
                raise GrammarError(f"the productions of {action or 'the grammar'} are not JSON: {error}") from None
    try:
        rules = {
            name: tuple(Rule(_read_query(r.get("condition", "")), read_symbols(r["rhs"])) for r in alternatives)
            for name, alternatives in productions.items()
        }
    except (AttributeError, KeyError, TypeError):
        raise GrammarError("a production is not a list of alternatives with an `rhs`") from None
    return Grammar(rules, commands, feedback)


def _fields(text: str) -> Iterator[tuple[str, str, str]]:
    """Action (empty outside of one), field and content of everything that the grammar states."""
    at, action = _skip(text, 0), ""
    while at < len(text):
        if found := _FIELD.match(text, at):
            yield action, found[1], found[2] if found[2] is not None else found[3]
        elif not action and (found := _OPEN.match(text, at)):
            action = found[1].lower()
        elif action and text[at] == "}":
            at, action = _skip(text, at + 1), ""
            continue
        else:
            raise GrammarError(f"unexpected text at character {at}: {text[at : at + 40]!r}")
        at = _skip(text, found.end())


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


_SYMBOL = re.compile(
    r"(?P<open>\[\s*)?\{(?P<said>[^|{}\[\]]+?)(?:\s*\|\s*(?P<query>[^|{}\[\]#]+))?\}(?(open)\s*\])"
    r"|#(?P<name>[^#\[\]{}]+)#|(?P<words>[^#\[\]{}]+)"
)


@lru_cache(maxsize=4096)
def read_symbols(text: str) -> Symbols:
    """The symbols of a text.

    Raises:
        GrammarError: An expression is not of the forms that are used.
    """
    symbols: list[Symbol] = []
    at = 0
    text = text.replace("\\n", "\n").lstrip()  # TextWorld's parser drops leading white space, as that of " (is open)"
    while at < len(text) and (found := _SYMBOL.match(text, at)):  # what is beyond a stray bracket, TextWorld drops too
        if found["words"] is not None:
            symbols.append(Words(found["words"]))
        elif found["name"] is not None:
            symbols.append(Production(found["name"]))
        else:
            said, query = found["said"].strip(), _read_query(found["query"] or "")
            is_name = said.startswith("#") and said.endswith("#")
            symbols.append(
                ForEach(Production(said[1:-1]) if is_name else _read_expression(said), query, found["open"] is not None)
            )
        at = found.end()
    return tuple(symbols)


_TERM = re.compile(r"\s*(?:'([^']*)'|([a-z_]\w*)(?:\.(name|id|type|indefinite|definite))?)\s*$", re.IGNORECASE)


def _read_expression(text: str) -> Expression:
    alternatives = []
    for part in re.split(r"\bor\b", text):
        terms: list[Term] = []
        for piece in part.split("+"):
            found = _TERM.match(piece)
            if not found:
                raise GrammarError(f"the expression {{{text}}} is not supported")
            terms.append(("", found[1]) if found[1] is not None else (f"?{found[2]}", found[3] or "name"))
        alternatives.append(tuple(terms))
    return Expression(tuple(alternatives))


_FACT = re.compile(r"\s*([\w@-]+)\(([^()]*)\)\s*")


def _read_query(text: str) -> Query:
    if not text.strip():
        return ()
    facts = []
    for part in text.split("&"):
        found = _FACT.fullmatch(part)
        if not found:
            raise GrammarError(f"the condition {text!r} is not supported")
        names = [word.strip().partition(":") for word in found[2].split(",") if word.strip()]
        facts.append((found[1], tuple((f"?{name}", kind or "object") for name, _, kind in names)))
    return tuple(facts)
