"""What a game says: texts of its grammar, filled in from what holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from lit_agentrl.envs.alfworld.grammar import (
    Expression,
    ForEach,
    Grammar,
    GrammarError,
    Production,
    Query,
    Symbols,
    Words,
)
from lit_agentrl.envs.alfworld.matching import Binding, Facts, World

_DEEPEST = 50
"""Productions inside one another; a grammar that needs more runs in circles."""


class Narrator:
    """Derives texts.

    Args:
        grammar: The texts.
        world: The facts that never change, and the types.
        types: The type of each object.
        names: What to call each object.
    """

    def __init__(self, grammar: Grammar, world: World, types: Mapping[str, str], names: Mapping[str, str]) -> None:
        self._grammar = grammar
        self._world = world
        self._types = types
        self._names = names

    def produce(self, name: str, now: Facts, binding: Binding, depth: int = 0) -> str:
        """The text of a production: of its first alternative whose condition holds."""
        if depth > _DEEPEST:
            raise GrammarError(f"the production {name!r} runs in circles")
        for rule in self._grammar.productions.get(name, ()):
            if not rule.condition or next(self._answers(rule.condition, now, binding), None) is not None:
                return self.render(rule.symbols, now, binding, depth)
        raise GrammarError(f"there is no text for the production {name!r}")

    def render(self, symbols: Symbols, now: Facts, binding: Binding, depth: int = 0) -> str:
        """The text of symbols."""
        parts = []
        for symbol in symbols:
            if isinstance(symbol, Words):
                parts.append(symbol.text)
            elif isinstance(symbol, Production):
                parts.append(self.produce(symbol.name, now, binding, depth + 1))
            else:
                parts.append(self._repeat(symbol, now, binding, depth))
        return "".join(parts)

    def _repeat(self, symbol: ForEach, now: Facts, binding: Binding, depth: int) -> str:
        answers = self._answers(symbol.query, now, binding) if symbol.query else iter([binding])
        said = [self._say(symbol.said, now, answer, depth) for answer in answers]
        if not symbol.is_list:
            return "".join(said)
        if not said:
            return self.produce("list_empty", now, binding, depth + 1)
        if len(said) == 1:
            return said[0]
        separator = self.produce("list_separator", now, binding, depth + 1)
        return separator.join(said[:-1]) + self.produce("list_last_separator", now, binding, depth + 1) + said[-1]

    def _say(self, said: Expression | Production, now: Facts, binding: Binding, depth: int) -> str:
        if isinstance(said, Production):
            return self.produce(said.name, now, binding, depth + 1)
        texts = ("".join(self._term(variable, what, binding) for variable, what in a) for a in said.alternatives)
        return next((text for text in texts if text), "")

    def _term(self, variable: str, what: str, binding: Binding) -> str:
        if not variable:
            return what
        if variable not in binding:
            raise GrammarError(f"nothing is known of {variable!r} where the text speaks of it")
        thing = binding[variable]
        said = {"name": self._names.get(thing, thing), "id": thing, "type": self._types.get(thing, "")}
        return said.get(what) or {"indefinite": "a", "definite": "the"}.get(what, "")

    def _answers(self, query: Query, now: Facts, binding: Binding) -> Iterator[Binding]:
        """The bindings that fulfil the query, in TextWorld's order; different variables are different things."""
        if not query:
            yield binding
            return
        (predicate, variables), rest = query[0], query[1:]
        pattern, kinds = (predicate, *(name for name, _ in variables)), dict(variables)
        source = now if predicate in self._world.dynamic else self._world.fixed
        for fact in source.matching(pattern, binding):
            extended = self._world.unify(pattern, fact, kinds, binding)
            if extended is not None and len(set(extended.values())) == len(extended):
                yield from self._answers(rest, now, extended)


def display_names(ids: Iterable[str]) -> dict[str, str]:
    """What ALFWorld calls objects: `mug_bar__plus_01...` and its like are mug 1, mug 2, ... in reverse order of ids."""
    ordered = sorted(ids)
    counts = Counter(_kind(name) for name in ordered if "_bar_" in name)
    names = {}
    for name in ordered:
        if "_bar_" not in name:
            names[name] = name
            continue
        kind = _kind(name)
        names[name] = f"{kind} {counts[kind]}"
        counts[kind] -= 1
    return names


def _kind(name: str) -> str:
    """The type in an id. Basins are parts of sinks and bathtubs: `sink_bar_..._bar_sinkbasin` is a sinkbasin."""
    return name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "")
