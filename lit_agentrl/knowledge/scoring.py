"""How far an answer agrees with the graph, and the score by which answers are preferred."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.answers import Fact, FactReader
from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.names import name_key, words_of
from lit_agentrl.knowledge.retrieval import TOP, retrieve
from lit_agentrl.knowledge.schema import Edge
from lit_agentrl.knowledge.similarity import BM25Similarity, Similarity

MOST_CACHED = 1 << 12


@dataclass(frozen=True, slots=True)
class FactScore:
    """An answer's facts against the neighbourhood of a disease."""

    support: float
    """prec = supported / max(1, facts)."""
    contradiction: float
    """contra = contradicted / max(1, facts)."""
    coverage: float
    """rec = the share of the retrieved facts that the answer states; 0 where none were retrieved."""
    supported: tuple[Fact, ...]
    """In the graph."""
    contradicted: tuple[Fact, ...]
    """The graph knows the relation for this disease, with other objects; or the answer denies what the graph says."""
    unknown: tuple[Fact, ...]
    """The graph says nothing about this relation of this disease."""
    retrieved: tuple[Edge, ...]
    """What the question asks for."""

    @property
    def num_facts(self) -> int:
        """How many facts were read in the answer."""
        return len(self.supported) + len(self.contradicted) + len(self.unknown)


@dataclass(frozen=True, slots=True)
class _Around:
    """The neighbourhood of a disease, as it is looked up."""

    triples: frozenset[tuple[str, str, str]]
    relations: frozenset[tuple[str, str]]


class FactScorer:
    """Scores answers about the diseases of a graph.

    Args:
        graph: What is taken to be true.
        top: How many facts are retrieved for a question; what coverage is a share of.
        hops: How far the neighbourhood goes.
        threshold: The least similarity of a retrieved fact; None for the similarity's own.
        similarity: How facts are retrieved.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        top: int = TOP,
        hops: int = 1,
        threshold: float | None = None,
        similarity: Similarity | None = None,
    ) -> None:
        if top < 1:
            raise UserError(f"top={top}: at least 1 fact has to be asked for.")
        self.graph, self.reader = graph, FactReader(graph)
        self._options = top, hops, threshold, similarity or BM25Similarity()
        # The graph does not change, so what is cached here is cached by its hash.
        self._around = lru_cache(MOST_CACHED)(self._neighbourhood)
        self.retrieved = lru_cache(MOST_CACHED)(self._retrieve)
        """The facts that a question about a disease asks for, by (disease, question)."""

    def knows(self, disease: str) -> bool:
        """Whether answers about the disease can be scored."""
        found = self.graph.find(disease)
        return found is not None and self.graph.network.out_degree(found) > 0

    def score(self, answer: str, disease: str, question: str) -> FactScore:
        """The facts of an answer to a question about a disease, judged.

        Raises:
            UnknownDiseaseError: The graph has no facts about the disease.
        """
        name = self.graph.disease(disease)
        retrieved, around = self.retrieved(name, question), self._around(name)
        judged: dict[str, list[Fact]] = {"supported": [], "contradicted": [], "unknown": [], "denied": []}
        for fact in self.reader.read(answer, name):
            judged[judge(fact, around.triples, around.relations)].append(fact)
        supported, contradicted, unknown = (tuple(judged[key]) for key in ("supported", "contradicted", "unknown"))
        count = max(1, len(supported) + len(contradicted) + len(unknown))
        stated = {fact.triple for fact in supported}
        covered = sum(edge.triple in stated for edge in retrieved)
        return FactScore(
            support=len(supported) / count,
            contradiction=len(contradicted) / count,
            coverage=covered / max(1, len(retrieved)),
            supported=supported,
            contradicted=contradicted,
            unknown=unknown,
            retrieved=retrieved,
        )

    def _neighbourhood(self, name: str) -> _Around:
        edges = self.graph.edges_of(name, self._options[1])
        return _Around(frozenset(edge.triple for edge in edges), frozenset(edge.triple[:2] for edge in edges))

    def _retrieve(self, name: str, question: str) -> tuple[Edge, ...]:
        return tuple(retrieve(self.graph, name, question, *self._options))


def judge(fact: Fact, triples: frozenset[tuple[str, str, str]], relations: frozenset[tuple[str, str]]) -> str:
    """What a neighbourhood says to a fact: supported, contradicted, unknown, or denied (rightly: it is no fact)."""
    is_there = fact.triple in triples
    if fact.is_denied:
        return "contradicted" if is_there else "denied"
    if is_there:
        return "supported"
    return "contradicted" if (fact.subject, fact.relation) in relations else "unknown"


@dataclass(frozen=True, slots=True)
class ScoreWeights:
    """The weights of `answer_score`, with the defaults of the reconstruction."""

    label: float = 1.0
    support: float = 0.6
    coverage: float = 0.4
    contradiction: float = 0.6
    fault: float = 0.1


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """S(y) and what it is made of."""

    total: float
    is_correct: bool
    has_fault: bool
    facts: FactScore
    weights: ScoreWeights = field(default_factory=ScoreWeights)

    def parts(self) -> Mapping[str, float]:
        """The numbers by name, for logs and provenance."""
        return {
            "total": self.total,
            "label": float(self.is_correct),
            "support": self.facts.support,
            "coverage": self.facts.coverage,
            "contradiction": self.facts.contradiction,
            "fault": float(self.has_fault),
            "num_facts": self.facts.num_facts,
        }


def answer_score(
    answer: str,
    label: str | None,
    gold: str,
    scorer: FactScorer,
    question: str,
    *,
    has_format_fault: bool = False,
    weights: ScoreWeights | None = None,
) -> AnswerScore:
    """S(y) = label * 1[label = gold] + support * prec + coverage * rec - contradiction * contra - fault * 1[fault].

    Args:
        answer: The text, y.
        label: The disease that the answer names; None where it names none.
        gold: The right disease, which the facts are judged for.
        scorer: Judges them.
        question: What was asked.
        has_format_fault: Whether the answer lacks its form; repetition is looked for here.
        weights: Of the terms.

    Raises:
        UnknownDiseaseError: The graph has no facts about the right disease.
    """
    weights = weights or ScoreWeights()
    facts = scorer.score(answer, gold, question)
    is_correct = label is not None and _is_same(label, gold, scorer.graph)
    has_fault = has_format_fault or is_repetitive(answer)
    total = (
        weights.label * is_correct
        + weights.support * facts.support
        + weights.coverage * facts.coverage
        - weights.contradiction * facts.contradiction
        - weights.fault * has_fault
    )
    return AnswerScore(total, is_correct, has_fault, facts, weights)


def _is_same(label: str, gold: str, graph: KnowledgeGraph) -> bool:
    """Whether two names are one disease's; names that the graph lacks are compared as they are."""
    return name_key(label) == name_key(gold) or (graph.find(label) or label) == (graph.find(gold) or gold)


def is_repetitive(answer: str, length: int = 4, most: int = 3) -> bool:
    """Whether some `length` words in a row come more than `most` times: what a model in a loop writes."""
    words = [word.lower() for word in words_of(answer)]
    counts: dict[tuple[str, ...], int] = {}
    for place in range(len(words) - length + 1):
        run = tuple(words[place : place + length])
        counts[run] = counts.get(run, 0) + 1
        if counts[run] > most:
            return True
    return False
