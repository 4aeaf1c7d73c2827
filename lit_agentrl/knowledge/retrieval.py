"""From a disease and a question to the facts that answer it, and to the prompt that shows them (KG-RAG)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.schema import RELATIONS, Edge
from lit_agentrl.knowledge.similarity import BM25Similarity, Similarity, fact_text

TOP = 8
_PLACE = {name: place for place, name in enumerate(RELATIONS)} | {"coded_as": len(RELATIONS)}
_BM25 = BM25Similarity()


def retrieve(
    graph: KnowledgeGraph,
    disease: str,
    question: str,
    top: int = TOP,
    hops: int = 1,
    threshold: float | None = None,
    similarity: Similarity = _BM25,
) -> list[Edge]:
    """The facts around a disease that are nearest to the disease and the question, best first, each said once.

    Among equally near ones the relations take turns, so that a question which names none gets some of each.

    Args:
        graph: Where facts are from.
        disease: Whose neighbourhood is searched, by any of its names.
        question: What is asked.
        top: At most so many facts.
        hops: How far the neighbourhood goes; further facts are about what the disease is joined to.
        threshold: The least similarity that counts; None for the similarity's own, and where that has none: facts that
            share nothing with the question are left out, unless all do.
        similarity: How near a fact is.

    Raises:
        UserError: `top` or `hops` is out of range.
        UnknownDiseaseError: The graph has no facts about the disease.
    """
    if top < 1:
        raise UserError(f"top={top}: at least 1 fact has to be asked for.")
    edges = in_turns(list({edge.triple: edge for edge in reversed(graph.edges_of(disease, hops))}.values())[::-1])
    scores = similarity(f"{disease} {question}", edges)
    ranked = sorted(zip(scores, range(len(edges)), strict=True), key=lambda item: (-item[0], item[1]))
    least = similarity.threshold if threshold is None else threshold
    if least is not None:
        return [edges[place] for score, place in ranked[:top] if score >= least]
    # Without a threshold, what shares nothing with the question counts only where nothing shares anything with it.
    return [edges[place] for score, place in ranked[:top] if score > 0 or ranked[0][0] <= 0]


def in_turns(edges: Sequence[Edge]) -> list[Edge]:
    """One fact of each relation, then the second ones, and so on; codes last in each turn."""
    turns: Counter[tuple[str, str]] = Counter()
    ranked = []
    for place, edge in enumerate(edges):
        turns[edge.subject, edge.relation] += 1
        ranked.append((turns[edge.subject, edge.relation], _PLACE[edge.relation], place, edge))
    return [edge for *_, edge in sorted(ranked, key=lambda item: item[:3])]


def kg_context(edges: Sequence[Edge]) -> str:
    """The facts as a list of sentences, one a line; how often, where a source says so."""
    return "\n".join(f"- {fact_text(edge)}{f' ({edge.frequency})' if edge.frequency else ''}" for edge in edges)


def kg_prompt(edges: Sequence[Edge], question: str, disease: str) -> str:
    """The question with what the graph knows and the disease's name before it; without facts, the name alone."""
    known = f"What is known about {disease}:\n{kg_context(edges)}\n\n" if edges else ""
    return f"{known}The name of the disease is {disease}.\n\n{question}"
