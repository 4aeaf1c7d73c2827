"""Which variables a condition can be true of: facts, indexed, and a search over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lit_agentrl.envs.alfworld.pddl import ANYTHING, Conjunction, Fact

Binding = dict[str, str]
"""Variables and the objects they stand for."""
_NONE: Sequence[Fact] = ()


class Facts:
    """Facts that can be asked for by predicate, and by one argument. They are given in alphabetical order.

    Args:
        facts: The facts.
    """

    def __init__(self, facts: Iterable[Fact]) -> None:
        self._index: dict[tuple[str | int, ...], list[Fact]] = {}
        self.all = frozenset(facts)
        for fact in sorted(self.all):
            self._index.setdefault((fact[0],), []).append(fact)
            for place, argument in enumerate(fact[1:], 1):
                self._index.setdefault((fact[0], place, argument), []).append(fact)

    def matching(self, pattern: Fact, binding: Binding) -> Sequence[Fact]:
        """Facts that may fit the pattern: those of its predicate with the rarest of its known arguments."""
        found = self._index.get((pattern[0],), _NONE)
        for place, word in enumerate(pattern[1:], 1):
            argument = binding.get(word) if word[0] == "?" else word
            if argument is not None:
                some = self._index.get((pattern[0], place, argument), _NONE)
                if len(some) < len(found):
                    found = some
        return found


class World:
    """Facts that never change and facts of the moment, seen as one, with the types of the objects.

    Args:
        members: The objects of each type.
        fixed: The facts that never change.
        dynamic: The predicates that actions change.
    """

    def __init__(self, members: Mapping[str, frozenset[str]], fixed: Facts, dynamic: frozenset[str]) -> None:
        self.members = members
        self.fixed = fixed
        self.dynamic = dynamic

    def solutions(self, condition: Conjunction, types: Mapping[str, str], now: Facts, given: Binding) -> list[Binding]:
        """All ways to bind the variables of `types` and of the condition so that it holds, `given` among them.

        Args:
            condition: What must hold.
            types: The type of each variable, those of `condition.types` left out.
            now: The facts of the moment.
            given: Variables that are known.
        """
        kinds = {**types, **dict(condition.types)}
        return [
            binding
            for binding in self._extend(list(condition.positive), kinds, now, dict(given))
            if not any(self._holds(fact, binding, now) for fact in condition.negative)
        ]

    def _extend(
        self, patterns: list[Fact], kinds: Mapping[str, str], now: Facts, binding: Binding
    ) -> Iterator[Binding]:
        """Bind the pattern with the fewest candidates, then the others; then variables that no pattern speaks of."""
        if not patterns:
            free = next((name for name in kinds if name not in binding), None)
            if free is None:
                yield binding
                return
            for member in sorted(self.members.get(kinds[free], frozenset())):
                yield from self._extend(patterns, kinds, now, {**binding, free: member})
            return
        choices = [
            (now if pattern[0] in self.dynamic else self.fixed).matching(pattern, binding) for pattern in patterns
        ]
        best = min(range(len(patterns)), key=lambda index: len(choices[index]))
        rest = patterns[:best] + patterns[best + 1 :]
        for fact in choices[best]:
            if (extended := self.unify(patterns[best], fact, kinds, binding)) is not None:
                yield from self._extend(rest, kinds, now, extended)

    def unify(self, pattern: Fact, fact: Fact, kinds: Mapping[str, str], binding: Binding) -> Binding | None:
        """The binding under which the pattern is the fact; None if there is none."""
        if len(pattern) != len(fact):
            return None
        extended = dict(binding)
        for word, argument in zip(pattern[1:], fact[1:], strict=True):
            if word[0] != "?":
                if word != argument:
                    return None
            elif (known := extended.get(word)) is None:
                kind = kinds.get(word, ANYTHING)
                if kind != ANYTHING and argument not in self.members.get(kind, frozenset()):
                    return None
                extended[word] = argument
            elif known != argument:
                return None
        return extended

    def _holds(self, fact: Fact, binding: Binding, now: Facts) -> bool:
        ground = grounded(fact, binding)
        if ground[0] == "=":
            return ground[1] == ground[2]
        return ground in (now if ground[0] in self.dynamic else self.fixed).all


def grounded(fact: Fact, binding: Mapping[str, str]) -> Fact:
    """The fact with its variables replaced."""
    return tuple([binding.get(word, word) for word in fact])
