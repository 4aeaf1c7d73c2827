"""Short texts of our own about the seven classes of HAM10000, and the facts that the extractor reads in them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.extract import Extraction, extract_edges
from lit_agentrl.knowledge.names import name_key
from lit_agentrl.knowledge.schema import check_relation
from lit_agentrl.knowledge.sources import Part

SOURCE = "notes"
LICENCE = (
    "notes: written for this project in our own words, under the project's licence (Apache-2.0). General knowledge, "
    "simplified; not medical advice."
)


def notes_part() -> Part:
    """The notes as a part of a graph."""
    found = read_notes()
    counts = {
        "sentences": found.num_sentences,
        "sentences without a fact": len(found.unread),
        "edges": len(found.edges),
    }
    return Part(SOURCE, list(found.edges), dict(found.names), LICENCE, counts)


@cache
def read_notes() -> Extraction:
    """The facts of all notes; the text's file stands in an edge's reference."""
    found = Extraction()
    for path in sorted(files(__package__).iterdir(), key=lambda item: item.name):
        if not path.name.endswith(".txt"):
            continue
        part = extract_edges(path.read_text(encoding="utf-8"), SOURCE)
        found.edges += [edge.at(f"{path.name}, {edge.reference}") for edge in part.edges]
        found.names |= part.names
        found.unread += part.unread
        found.num_sentences += part.num_sentences
    return found


def note_diseases() -> list[str]:
    """The classes that notes are about."""
    return sorted({edge.subject for edge in read_notes().edges})


def facts(disease: str, relation: str) -> list[str]:
    """What the notes say about a class, in the order of the text; empty where they do not use the relation for it.

    Args:
        disease: A class of the notes, by any of its names: melanoma, Seborrhoeic keratoses, BCC.
        relation: One of RELATIONS.

    Raises:
        UserError: There is no note about it, or no such relation.
    """
    check_relation(relation)
    if (name := _by_key().get(name_key(disease))) is None:
        raise UserError(f"no note is about {disease!r}. The notes are about: {', '.join(note_diseases())}.")
    return list(_facts().get((name, relation), ()))


@cache
def _by_key() -> dict[tuple[str, ...], str]:
    classes, names = note_diseases(), read_notes().names
    others = {name_key(other): name for name in classes for other in names[name]}
    return others | {name_key(name): name for name in classes}


@cache
def _facts() -> dict[tuple[str, str], tuple[str, ...]]:
    found: dict[tuple[str, str], dict[str, None]] = {}
    for edge in read_notes().edges:
        found.setdefault((edge.subject, edge.relation), {})[edge.object] = None
    return {key: tuple(objects) for key, objects in found.items()}
