"""The knowledge graph: names joined by facts, each fact with where it is from."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import networkx as nx

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.names import Key, name_key, tidy
from lit_agentrl.knowledge.schema import RELATIONS, Edge, check_relation

__all__ = ["RELATIONS", "Edge", "KnowledgeGraph", "UnknownDiseaseError"]

MOST_HOPS = 3


class UnknownDiseaseError(UserError):
    """The graph knows nothing about a disease; who asks for many may count it and go on."""


class KnowledgeGraph:
    """Facts over names; it does not change once made.

    Names that differ in plural, spelling (naevus, nevus) or punctuation are one node. Several relations of a pair are
    kept, and so is the same fact from several sources: `network` is a networkx MultiDiGraph, an `Edge` on each edge.

    Args:
        edges: The facts; equal ones count once, and a fact about itself is dropped.
        synonyms: Other names by name. One that is a node itself, or that two nodes claim, is left out.

    Raises:
        UserError: There are no edges.
    """

    def __init__(self, edges: Iterable[Edge], synonyms: Mapping[str, Iterable[str]] | None = None) -> None:
        edges = {edge for edge in edges if name_key(edge.subject) != name_key(edge.object)}
        if not edges:
            raise UserError("a knowledge graph needs facts: there are none. Add a source or a text.")
        written = _writing(name for edge in edges for name in (edge.subject, edge.object))
        self.network = nx.MultiDiGraph()
        self.network.add_nodes_from(sorted(written.values()))
        # Renamed first: two sources' facts may differ in a plural alone.
        for edge in sorted({_renamed(edge, written) for edge in edges}, key=_order):
            self.network.add_edge(edge.subject, edge.object, fact=edge)
        self.synonyms = _synonyms(written, synonyms or {})
        self._nodes = dict(written)
        self._others = {name_key(other): name for name, others in self.synonyms.items() for other in others}

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All facts in a fixed order."""
        return tuple(sorted((fact for *_, fact in self.network.edges(data="fact")), key=_order))

    @cached_property
    def sha256(self) -> str:
        """Of all facts, their provenance and all names: the same whatever order they came in."""
        lines = [[*edge.triple, edge.source, edge.reference, edge.frequency, edge.sentence] for edge in self.edges]
        names = [[name, *self.synonyms[name]] for name in sorted(self.synonyms)]
        return hashlib.sha256(json.dumps([lines, names], ensure_ascii=False).encode()).hexdigest()

    def __len__(self) -> int:
        """The number of facts, the same fact from two sources counted twice."""
        return int(self.network.number_of_edges())

    @cached_property
    def _subjects(self) -> frozenset[str]:
        return frozenset(edge.subject for edge in self.edges if edge.relation != "is_a")

    def diseases(self) -> list[str]:
        """The names that facts other than is_a are about, sorted."""
        return sorted(self._subjects)

    def is_disease(self, name: str) -> bool:
        """Whether it is one of `diseases`."""
        return name in self._subjects

    def find(self, name: str) -> str | None:
        """The node of this name or synonym, whatever its plural, spelling or punctuation; None if there is none."""
        return self.find_key(name_key(name))

    def find_key(self, key: Key) -> str | None:
        """The same for a name that `name_key` was applied to."""
        return self._nodes.get(key) or self._others.get(key)

    def names(self) -> Mapping[Key, str]:
        """The node of every name and synonym."""
        return self._others | self._nodes

    def disease(self, name: str) -> str:
        """The node that facts about this disease start from.

        Raises:
            UnknownDiseaseError: The graph has no facts about it.
        """
        found = self.find(name)
        if found is not None and self.network.out_degree(found):
            return found
        near = difflib.get_close_matches(tidy(name), self.diseases(), n=3, cutoff=0.6)
        hint = f"Near it: {', '.join(near)}." if near else "No name in it is near."
        raise UnknownDiseaseError(
            f"the knowledge graph ({len(self)} facts, {len(self._subjects)} diseases) knows nothing about {name!r}. "
            f"{hint} Add a source or a text that does: lit-agentrl build-kg OUTPUT --text FILE."
        )

    def edges_of(self, entity: str, hops: int = 1) -> list[Edge]:
        """The facts within so many steps along their direction, nearest first, in a fixed order.

        Raises:
            UserError: `hops` is out of range, or the graph has no facts about the entity.
        """
        if not 1 <= hops <= MOST_HOPS:
            raise UserError(f"hops={hops} is out of range: allowed are 1 to {MOST_HOPS}.")
        found: list[Edge] = []
        seen: set[str] = set()
        front = [self.disease(entity)]
        for _ in range(hops):
            seen.update(front)
            step = [fact for node in front for *_, fact in self.network.out_edges(node, data="fact")]
            found += sorted(step, key=_order)
            front = sorted({edge.object for edge in step} - seen)
        return found

    def objects(self, entity: str, relation: str) -> list[str]:
        """What stands in this relation to the entity, each once, in the order of the sources.

        Raises:
            UserError: There is no such relation, or the graph has no facts about the entity.
        """
        check_relation(relation)
        return list(dict.fromkeys(edge.object for edge in self.edges_of(entity) if edge.relation == relation))

    def save(self, path: str | Path) -> None:
        """Write it as GraphML (`.graphml`) or Parquet (`.parquet`), atomically.

        Raises:
            UserError: The ending is another, the file cannot be written, or the extra for Parquet is missing.
        """
        from lit_agentrl.knowledge.storage import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> KnowledgeGraph:
        """The graph that `save` wrote.

        Raises:
            UserError: There is no such file, or it does not hold a graph of this schema.
        """
        from lit_agentrl.knowledge.storage import load

        return load(Path(path))


def _renamed(edge: Edge, written: Mapping[Key, str]) -> Edge:
    """The fact with its names as the graph writes them."""
    subject, target = written[name_key(edge.subject)], written[name_key(edge.object)]
    return edge if (subject, target) == (edge.subject, edge.object) else replace(edge, subject=subject, object=target)


def _order(edge: Edge) -> tuple[str, ...]:
    return (*edge.triple, edge.source, edge.reference, edge.frequency or "", edge.sentence or "")


def _writing(names: Iterable[str]) -> dict[Key, str]:
    """How each name is written: as it is compared where a source does so, else the first in the alphabet."""
    found: dict[Key, str] = {}
    for name in sorted(set(names)):
        key = name_key(name)
        if key not in found or name == " ".join(key):
            found[key] = name
    return found


def _synonyms(written: Mapping[Key, str], given: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Names by node, without those that are nodes or have two owners."""
    owners: dict[Key, set[str]] = {}
    spelled: dict[Key, str] = {}
    for name, others in given.items():
        if (node := written.get(name_key(name))) is None:
            continue
        for other in map(tidy, others):
            if (key := name_key(other)) and key not in written:
                owners.setdefault(key, set()).add(node)
                spelled[key] = min(other, spelled.get(key, other))
    found: dict[str, list[str]] = {}
    for key, nodes in owners.items():
        if len(nodes) == 1:
            found.setdefault(min(nodes), []).append(spelled[key])
    return {name: tuple(sorted(others)) for name, others in sorted(found.items())}
