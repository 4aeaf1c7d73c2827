"""Names found in a text: as whole words, longest first, whatever their plural or spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from lit_agentrl.knowledge.names import Key, word_key

Value = TypeVar("Value")

_WORD = re.compile(r"[^\W_]+(?:\.\d\w*)?")
_TAG = re.compile(r"</?[^<>\s]{1,40}>")
_BREAK = re.compile(r"[.!?]+(?=\s|$)|[;\n]+")


class Word(NamedTuple):
    """A word of a text: as it is compared, and where it stands, in characters."""

    key: str
    start: int
    end: int
    is_heading: bool
    """Whether a colon follows: `symmetry: asymmetric`."""


class Mention(NamedTuple, Generic[Value]):
    """A name that was found: words `start` to `end` (excluded) of a sentence."""

    value: Value
    start: int
    end: int


class Linker(Generic[Value]):
    """Finds names in sentences.

    Args:
        names: What is to be found, and what each stands for.
    """

    def __init__(self, names: Mapping[Key, Value]) -> None:
        self._names = dict(names)
        lengths: dict[str, set[int]] = {}
        for key in self._names:
            if key:
                lengths.setdefault(key[0], set()).add(len(key))
        self._lengths = {first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()}

    def mentions(self, words: Sequence[Word], taken: Iterable[range] = ()) -> list[Mention[Value]]:
        """The names in a sentence from left to right, none inside another; `taken` words are passed over."""
        closed = {place for places in taken for place in places}
        keys = [word.key for word in words]
        found: list[Mention[Value]] = []
        place = 0
        while place < len(keys):
            end = place + 1
            for length in self._lengths.get(keys[place], ()):
                key = tuple(keys[place : place + length])  # shorter at the sentence's end
                if key in self._names:
                    if closed.isdisjoint(range(place, place + len(key))):
                        end = place + len(key)
                        found.append(Mention(self._names[key], place, end))
                    break
            place = end
        return found


def sentences_with_places(text: str) -> Iterator[list[Word]]:
    """The words of each sentence; tags such as </think> end one, and so does a semicolon or a line's end."""
    text = _TAG.sub(lambda match: "\n" * len(match[0]), text)  # of the same length: places stay true
    start = 0
    for end in [match.end() for match in _BREAK.finditer(text)] + [len(text)]:
        words = [
            Word(word_key(match[0]), match.start(), match.end(), text[match.end() : match.end() + 1] == ":")
            for match in _WORD.finditer(text, start, end)
            if match[0] != "s"
        ]
        if words:
            yield words
        start = end
