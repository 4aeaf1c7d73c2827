"""Formulas as lists of tokens: their exact value, and one that makes a target of given numbers. Nothing is `eval`ed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_NUMBER = 3


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """The value by the usual rules; None where the tokens are no formula, or it divides by zero.

    Two numbers beside each other are no formula, and neither is `* *`: as Python text "1 2" would be 12 and "2**3" 8.
    """
    try:
        value, rest = _sum(list(tokens))
    except (ValueError, ZeroDivisionError):
        return None
    return None if rest else value


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, rest = _product(tokens)
    while rest and rest[0] in ("+", "-"):
        term, after = _product(rest[1:])
        value, rest = (value + term if rest[0] == "+" else value - term), after
    return value, rest


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, rest = _factor(tokens)
    while rest and rest[0] in ("*", "/"):
        factor, after = _factor(rest[1:])
        value, rest = (value * factor if rest[0] == "*" else value / factor), after
    return value, rest


def _factor(tokens: list[str]) -> tuple[Fraction, list[str]]:
    if tokens and tokens[0].isdecimal():
        return Fraction(int(tokens[0])), tokens[1:]
    if not tokens or tokens[0] != "(":
        raise ValueError("a number or an opening bracket is missing")
    value, rest = _sum(tokens[1:])
    if not rest or rest[0] != ")":
        raise ValueError("a closing bracket is missing")
    return value, rest[1:]


@dataclass(frozen=True, slots=True)
class _Term:
    value: Fraction
    tokens: tuple[str, ...]
    precedence: int


def make_target(numbers: Sequence[int], target: int, operators: str) -> list[str] | None:
    """A formula that uses every number once and is worth `target`, with no bracket too many; None if there is none."""
    return _combine([_Term(Fraction(n), (str(n),), _NUMBER) for n in numbers], target, operators, set())


def _combine(terms: list[_Term], target: int, operators: str, hopeless: set[tuple[Fraction, ...]]) -> list[str] | None:
    """Join two terms to one until one is left; `hopeless` are values that were tried in vain."""
    if len(terms) == 1:
        return list(terms[0].tokens) if terms[0].value == target else None
    values = tuple(sorted(term.value for term in terms))
    if values in hopeless:
        return None
    for i, left in enumerate(terms):
        for j, right in enumerate(terms):
            if i == j:
                continue
            others = [term for k, term in enumerate(terms) if k not in (i, j)]
            for operator in operators:
                if (i > j and operator in "+*") or (operator == "/" and right.value == 0):
                    continue
                found = _combine([_join(left, operator, right), *others], target, operators, hopeless)
                if found is not None:
                    return found
    hopeless.add(values)
    return None


def _join(left: _Term, operator: str, right: _Term) -> _Term:
    rank, a, b = PRECEDENCE[operator], left.value, right.value
    value = a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b
    tight = right.precedence < rank or (right.precedence == rank and operator in "-/")
    first = ("(", *left.tokens, ")") if left.precedence < rank else left.tokens
    second = ("(", *right.tokens, ")") if tight else right.tokens
    return _Term(value, (*first, operator, *second), rank)
