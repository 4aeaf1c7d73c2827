"""A graph as a file: GraphML, which many tools read, or Parquet, which is small. Facts keep where they are from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError
from xml.parsers.expat import ExpatError, ParserCreate

import networkx as nx

from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.files import replace_atomically
from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.schema import Edge

FORMATS = ("graphml", "parquet")
COLUMNS = ("subject", "relation", "object", "source", "reference", "frequency", "sentence")
_NAMES = "lit_agentrl.synonyms"
"""Where a Parquet file keeps the other names: JSON in its metadata."""


def save(graph: KnowledgeGraph, path: Path) -> None:
    """Write the graph atomically, in the format of the path's ending."""
    write = {"graphml": _graphml, "parquet": _parquet}[format_of(path)]
    content = write(graph)
    try:
        replace_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Give a file in a folder of yours.") from error


def load(path: Path) -> KnowledgeGraph:
    """The graph that `save` wrote."""
    read = {"graphml": _from_graphml, "parquet": _from_parquet}[format_of(path)]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Build it: lit-agentrl build-kg {path.name}"
        ) from error
    with _as_user_error(path):
        return read(content)


def format_of(path: Path) -> str:
    """The format that a path's ending names.

    Raises:
        UserError: It names none, or the package for Parquet is missing.
    """
    ending = path.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise UserError(f"{path} is no knowledge graph by its name: it should end in .graphml or .parquet.")
    if ending == "parquet" and find_spec("pyarrow") is None:
        raise missing_extra("pyarrow", "parquet", f"{path.name}, a Parquet file,")
    return ending


_UNREADABLE = (
    ParseError, ExpatError, nx.NetworkXException, ValueError, KeyError, TypeError, AttributeError, OSError,
    NotImplementedError, RecursionError,
)  # fmt: skip


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """What readers raise for a file that is no graph of ours: wrong bytes, missing columns, unknown relations."""
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} does not hold a knowledge graph of this schema: {reason}") from error


def _graphml(graph: KnowledgeGraph) -> bytes:
    """Nodes with their other names as a JSON list, edges with the columns of a fact that it has."""
    plain = nx.MultiDiGraph()
    for name in sorted(graph.network):
        others = graph.synonyms.get(name, ())
        plain.add_node(name, synonyms=json.dumps(others, ensure_ascii=False))
    for edge in graph.edges:
        values = {name: getattr(edge, name) for name in COLUMNS[3:] if getattr(edge, name) is not None}
        plain.add_edge(edge.subject, edge.object, relation=edge.relation, **values)
    buffer = io.BytesIO()
    nx.write_graphml_xml(plain, buffer)
    return buffer.getvalue()


def _from_graphml(content: bytes) -> KnowledgeGraph:
    refuse_entities(content, _check_edge)
    plain = nx.read_graphml(io.BytesIO(content), force_multigraph=True)
    edges = [Edge(**_columns({"subject": start, "object": end} | data)) for start, end, data in plain.edges(data=True)]
    names = {name: _listed(data["synonyms"]) for name, data in plain.nodes(data=True) if "synonyms" in data}
    return KnowledgeGraph(edges, names)


def _columns(data: Mapping[str, Any]) -> dict[str, str]:
    if missing := [name for name in COLUMNS[:4] if data.get(name) is None]:
        raise ValueError(f"a fact lacks {', '.join(missing)}")
    return {name: str(data[name]) for name in COLUMNS if name in data}


def _listed(text: str) -> list[str]:
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the synonyms of a node must be a JSON list of texts")
    return names


def _check_edge(tag: str, attributes: Mapping[str, str]) -> None:
    """Refuse an edge with one end: networkx would join it to a node that is called None."""
    if tag.rpartition(":")[2] == "edge" and not {"source", "target"} <= attributes.keys():
        raise ValueError("an edge lacks its source or target")


def refuse_entities(content: bytes, check: Callable[[str, Mapping[str, str]], None] | None = None) -> None:
    """Refuse XML with a document type: entities are declared there, which can grow without bound or name other files.

    networkx reads by xml.etree, whose parser would expand them.

    Args:
        content: The file.
        check: Looks at each element's tag and attributes.
    """
    parser = ParserCreate()
    parser.StartElementHandler = check

    def refuse(name: str, *rest: object) -> None:
        raise ValueError(f"it declares a document type ({name}), which is not read as it may hold entities")

    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)


def _parquet(graph: KnowledgeGraph) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [getattr(edge, name) for edge in graph.edges] for name in COLUMNS}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    table = table.replace_schema_metadata({_NAMES: json.dumps(graph.synonyms, ensure_ascii=False)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _from_parquet(content: bytes) -> KnowledgeGraph:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(content))
    if missing := [name for name in COLUMNS[:4] if name not in table.column_names]:
        raise ValueError(f"the columns {', '.join(missing)} are missing")
    rows = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    stored = json.loads((table.schema.metadata or {}).get(_NAMES.encode(), b"{}"))
    if not isinstance(stored, dict):
        raise ValueError("the names in its metadata must be a JSON object")
    names = {name: _listed(json.dumps(others)) for name, others in stored.items()}
    return KnowledgeGraph([Edge(**{name: value or "" for name, value in row.items()}) for row in rows], names)
