"""A text as sentences with their lines: headings name what the sentences after them are about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lit_agentrl.knowledge.names import one_line

COMMENT = "%"
_END = re.compile(r"(?<=[.!?])\s+(?=[^\W_a-z])")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, or a heading."""

    line: int
    """Where it begins, from 1."""
    text: str
    """On one line, without the heading's marks."""
    is_heading: bool = False


def sentences_of(text: str) -> Iterator[Sentence]:
    """Headings (`# Melanoma`) and sentences in order; lines that begin with % are comments."""
    paragraph: list[tuple[int, str]] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith((COMMENT, "#")):
            paragraph.append((number, stripped.lstrip("-*• ")))
            if not stripped.startswith(("-", "*", "•")) or len(paragraph) == 1:
                continue
            paragraph, last = [paragraph[-1]], paragraph[:-1]  # a list's items are sentences of their own
            yield from _split(last)
            continue
        yield from _split(paragraph)
        paragraph = []
        if stripped.startswith("#"):
            yield Sentence(number, one_line(stripped.lstrip("#")), is_heading=True)


def _split(paragraph: list[tuple[int, str]]) -> Iterator[Sentence]:
    """The sentences of lines that belong together."""
    joined = "\n".join(line for _, line in paragraph)
    start = 0
    for end in [match.end() for match in _END.finditer(joined)] + [len(joined)]:
        if text := one_line(joined[start:end]):
            yield Sentence(paragraph[joined.count("\n", 0, start)][0], text)
        start = end
