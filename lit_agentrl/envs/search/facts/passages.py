"""The corpus: fields of records packed into passages of about as many words as are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_BORDERS = (r"(?<=[.!?])\s+", r"(?<=;)\s+", r"(?<=,)\s+", r"\s+")
"""Where a long text is cut: between sentences if that is enough, else at semicolons, commas, words."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of the corpus; titles are unique."""

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """What is indexed and shown, in Search-R1's layout."""
        return f'"{self.title}"\n{self.text}'


@dataclass(slots=True)
class Corpus:
    """Passages as they are made, and where each whole field stands.

    Args:
        words: The most words of a passage's text.
    """

    words: int
    passages: dict[str, Passage] = field(default_factory=dict)
    places: dict[tuple[str, str], str] = field(default_factory=dict)
    """The passage of a field by the record's name and the field's; fields that were cut have none."""
    _titles: set[str] = field(default_factory=set)

    def add(self, record: str, title: str, fields: Iterable[tuple[str, str]]) -> None:
        """Pack a record's fields, in their order, as `name: text.` or, where the name is empty, as bare text."""
        packed: list[tuple[list[str], list[str]]] = []
        room = 0
        for name, text in fields:
            pieces = list(cut(text, max(1, self.words - len(name.split()))))
            for piece in pieces:
                said = _sentence(f"{name}: {piece}" if name else piece)
                if len(said.split()) > room:
                    packed.append(([], []))
                    room = self.words
                room -= len(said.split())
                packed[-1][0].append(said)
                if len(pieces) == 1:
                    packed[-1][1].append(name)
        for number, (sentences, names) in enumerate(packed):
            passage = Passage(f"{record}/{number}", self._title(title, number), " ".join(sentences))
            self.passages[passage.id] = passage
            for name in names:
                self.places[record, name] = passage.id

    def _title(self, title: str, number: int) -> str:
        """A title that no passage has yet."""
        number += 1
        new = title if number == 1 else f"{title} ({number})"
        while new in self._titles:
            number += 1
            new = f"{title} ({number})"
        self._titles.add(new)
        return new


def cut(text: str, words: int, borders: tuple[str, ...] = _BORDERS) -> Iterator[str]:
    """Pieces of at most so many words, each as long as its borders allow; joined by spaces they are the text."""
    if len(text.split()) <= words:
        yield text
        return
    parts = re.split(borders[0], text)
    small = [piece for part in parts for piece in (cut(part, words, borders[1:]) if len(borders) > 1 else [part])]
    piece: list[str] = []
    size = 0
    for part in small:
        length = len(part.split())
        if piece and size + length > words:
            yield " ".join(piece)
            piece, size = [], 0
        piece.append(part)
        size += length
    yield " ".join(piece)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ";", ",")) else text + "."
