"""Facts from plain sentences by the patterns of `grammar`: equal texts give equal facts; what gave none is listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lit_agentrl.knowledge.grammar import SYNONYM, Reading, denies, readings
from lit_agentrl.knowledge.names import name_key, tidy
from lit_agentrl.knowledge.schema import Edge
from lit_agentrl.knowledge.sentences import Sentence, sentences_of

MOST_CHARACTERS = 1000
"""Of a sentence."""
Find = Callable[[str], str | None]
"""The name under which a disease is known, or None."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A sentence, or a line of a model, that gave no fact."""

    line: int
    text: str
    reason: str


@dataclass(slots=True)
class Extraction:
    """What a text says."""

    edges: list[Edge] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    """Other names by disease; headings are there with none."""
    unread: list[Unread] = field(default_factory=list)
    num_sentences: int = 0

    def reasons(self) -> dict[str, int]:
        """How many sentences gave nothing, by why."""
        return dict(sorted(Counter(item.reason for item in self.unread).items()))


def unknown_to_all(name: str) -> str | None:
    """Knows no disease but those of the text's headings."""
    return None


def extract_edges(text: str, source: str, find: Find = unknown_to_all) -> Extraction:
    """The facts of a text about diseases that `find` knows or a heading names.

    Args:
        text: Plain text. A line `# Melanoma` names the disease that `it` means below; lines with % are comments.
        source: What the edges name as their source.
        find: Gives the known name of a disease.
    """
    found = Extraction()
    headings = {name_key(item.text): tidy(item.text) for item in sentences_of(text) if item.is_heading}

    def known(name: str) -> str | None:
        return find(name) or headings.get(name_key(name))

    subject: str | None = None
    for sentence in sentences_of(text):
        if sentence.is_heading:
            subject = find(sentence.text) or tidy(sentence.text)
            found.names.setdefault(subject, [])
            continue
        found.num_sentences += 1
        subject = _read(sentence, source, subject, known, found)
    return found


def _read(sentence: Sentence, source: str, subject: str | None, known: Find, found: Extraction) -> str | None:
    """Add what the sentence says; gives the disease that `it` means after it."""
    if sentence.text.endswith("?") or len(sentence.text) > MOST_CHARACTERS:
        reason = (
            "it is a question" if sentence.text.endswith("?") else f"it is longer than {MOST_CHARACTERS} characters"
        )
        found.unread.append(Unread(sentence.line, sentence.text, reason))
        return subject
    reason = "no pattern fits"
    for reading in readings(sentence.text):
        about = subject if reading.subject is None else known(reading.subject)
        if about is None:
            reason = "its subject is no known disease"
            continue
        if reading.is_negated or not reading.objects:
            reason = "it denies something" if reading.is_negated else "its object is too long for a name"
            found.unread.append(Unread(sentence.line, sentence.text, reason))
            return about
        _add(reading, about, sentence, source, found)
        return about
    reason = "it denies something" if denies(sentence.text) else reason
    found.unread.append(Unread(sentence.line, sentence.text, reason))
    return subject


def _add(reading: Reading, about: str, sentence: Sentence, source: str, found: Extraction) -> None:
    if reading.relation == SYNONYM:
        found.names.setdefault(about, []).extend(tidy(name) for name in reading.objects)
    else:
        place, frequency = f"line {sentence.line}", reading.frequency
        found.edges += [
            Edge(about, reading.relation, name, source, place, frequency, sentence.text)
            for name in reading.objects
            if name_key(name)
        ]
    found.unread += [Unread(sentence.line, name, "its object is too long for a name") for name in reading.too_long]
