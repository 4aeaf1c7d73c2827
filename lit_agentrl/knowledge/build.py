"""`lit-agentrl build-kg`: a knowledge graph of skin diseases from installed packages, the project's notes and texts."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.extract import extract_edges
from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.hpo import read_hpo
from lit_agentrl.knowledge.icd import read_icd
from lit_agentrl.knowledge.notes import note_diseases, notes_part
from lit_agentrl.knowledge.sources import Part, join
from lit_agentrl.knowledge.storage import FORMATS, format_of

MAKER = "lit-agentrl build-kg"
SOURCES: dict[str, Callable[[], Part]] = {"hpo": read_hpo, "icd": read_icd, "notes": notes_part}
MOST_TEXT = 32 << 20
"""Bytes of one text file."""
SHOWN = 5
"""Sentences without a fact that are printed."""


def build_graph(
    sources: Sequence[str] = tuple(SOURCES), texts: Sequence[Path] = ()
) -> tuple[KnowledgeGraph, list[Part]]:
    """The graph of these sources, and what each of them gave.

    Args:
        sources: Of SOURCES; the order does not matter.
        texts: Files of plain sentences about diseases that the sources know, or that a heading (`# Melanoma`) names.

    Raises:
        UserError: There is no such source, its package is missing, or a file cannot be read.
    """
    if unknown := [name for name in sources if name not in SOURCES]:
        raise UserError(f"there is no source {', '.join(map(repr, unknown))}. Sources: {', '.join(SOURCES)}.")
    if not sources and not texts:
        raise UserError("nothing to build from: name a source (--sources notes) or a text (--text FILE).")
    given = [(path, _read_text(path)) for path in texts]  # before the packages are read, which takes seconds
    parts = [SOURCES[name]() for name in dict.fromkeys(sources)]
    known = join(parts) if parts and given else None
    parts += [_text_part(path, text, known) for path, text in given]
    return join(parts), parts


def report(graph: KnowledgeGraph, parts: Sequence[Part]) -> str:
    """What is in the graph, in lines: by source, by relation, the licences and the hash."""
    relations = Counter(edge.relation for edge in graph.edges)
    triples = len({edge.triple for edge in graph.edges})
    lines = [
        f"{part.source}: {', '.join(f'{number:,} {what}' for what, number in part.counts.items()) or 'nothing'}"
        for part in parts
    ]
    lines.append(
        f"graph: {len(graph):,} edges ({triples:,} different facts), {graph.network.number_of_nodes():,} names, "
        f"{len(graph.diseases()):,} diseases"
    )
    lines.append("relations: " + ", ".join(f"{name} {number:,}" for name, number in relations.most_common()))
    classes = {name: len(graph.edges_of(name)) for name in note_diseases() if graph.find(name) in graph.network}
    lines.append("edges of HAM10000's classes: " + ", ".join(f"{name} {number}" for name, number in classes.items()))
    lines += [f"licence of {part.licence}" for part in parts if part.licence]
    lines.append(f"sha256 {graph.sha256}")
    return "\n".join(lines)


def main(options: list[str]) -> None:
    """`lit-agentrl build-kg OUTPUT [--sources hpo icd notes] [--text FILE ...] [--format graphml|parquet]`."""
    parser = argparse.ArgumentParser(MAKER, description=__doc__, epilog="hpo and icd need the extra `kg`.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the file, ending in .graphml or .parquet")
    parser.add_argument(
        "--sources", nargs="*", choices=tuple(SOURCES), default=list(SOURCES), help="default: all three"
    )
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="plain sentences to read facts in"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: what OUTPUT ends in")
    parser.add_argument("--overwrite", action="store_true", help="replace another graph at OUTPUT")
    given = parser.parse_args(options)
    output = _output(given.output, given.format)
    graph, parts = build_graph(given.sources, given.text)
    print(report(graph, parts))
    if not given.overwrite and output.exists():
        if KnowledgeGraph.load(output).sha256 == graph.sha256:
            print(f"{output}: there already")
            return
        raise UserError(f"{output} holds another graph: give a new file, or add --overwrite to replace it.")
    graph.save(output)
    print(f"{output}: written")


def _output(path: Path, format: str | None) -> Path:
    """The file to write, refused before any work where it cannot be."""
    if format and path.suffix.lower().lstrip(".") not in FORMATS:
        path = path.with_name(f"{path.name}.{format}")
    if (ending := format_of(path)) != (format or ending):
        raise UserError(f"{path} ends in .{ending}, and --format says {format}: leave one of them out.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file.")
    return path


def _read_text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MOST_TEXT:
            raise UserError(f"--text {path} has {size:,} bytes: at most {MOST_TEXT:,} are read. Split it.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"--text {path} cannot be read ({reason}).") from error


def _text_part(path: Path, text: str, known: KnowledgeGraph | None) -> Part:
    """What the extractor reads in a file, about diseases that the graph knows or that the file's headings name."""

    def find(name: str) -> str | None:
        found = known.find(name) if known else None
        return found if known and found and known.is_disease(found) else None

    found = extract_edges(text, f"text {path.name}", find)
    counts = {"sentences": found.num_sentences, "edges": len(found.edges)}
    counts |= {f"sentences without a fact: {reason}": number for reason, number in found.reasons().items()}
    for item in found.unread[:SHOWN]:
        print(f"{path.name}, line {item.line} gave no fact, as {item.reason}: {item.text[:100]}")
    if (more := len(found.unread) - SHOWN) > 0:
        print(f"{path.name}: {more} more gave none")
    licence = f"text {path.name}: yours to know" if found.edges else ""
    return Part(f"text {path.name}", found.edges, found.names, licence, counts)
