"""What judges the facts of an answer: the knowledge graph, or whatever is like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lit_agentrl.knowledge import FactScorer


class Judgement(Protocol):
    """What a judge says of an answer (`knowledge.FactScore`)."""

    @property
    def support(self) -> float:
        """Share of the answer's facts that are known to be true, in [0, 1]; 0 for an answer without facts."""
        ...

    @property
    def contradiction(self) -> float:
        """Share of the answer's facts that are known to be wrong, in [0, 1]."""
        ...

    @property
    def coverage(self) -> float:
        """Share of what the question asks for that the answer says, in [0, 1]."""
        ...

    @property
    def num_facts(self) -> int:
        """How many facts were read in the answer."""
        ...


class FactJudge(Protocol):
    """Judges answers about diseases."""

    def knows(self, disease: str) -> bool:
        """Whether answers about the disease can be judged."""
        ...

    def score(self, answer: str, disease: str, question: str) -> Judgement:
        """The facts of an answer to a question about a disease, judged."""
        ...


class GraphFacts(FactJudge):
    """Judges by a knowledge graph; see docs/knowledge_graph.md.

    Args:
        graph: Its file (`.graphml`, `.parquet`); None for the built-in notes on HAM10000's seven classes.
        top: How many facts a question asks for; what coverage is a share of.
        hops: How far around the disease facts are looked for.
    """

    def __init__(self, graph: str | None = None, top: int = 8, hops: int = 1) -> None:
        self._options = graph, top, hops
        self._scorer: FactScorer | None = None

    def __getstate__(self) -> Mapping[str, object]:
        """Without the graph: worker processes read it for themselves."""
        return vars(self) | {"_scorer": None}

    def knows(self, disease: str) -> bool:
        """Whether the graph has facts about the disease."""
        return self.scorer.knows(disease)

    def score(self, answer: str, disease: str, question: str) -> Judgement:
        """The facts of an answer to a question about a disease, judged.

        Raises:
            UserError: The graph has no facts about the disease.
        """
        return self.scorer.score(answer, disease, question)

    @property
    def scorer(self) -> FactScorer:
        """What judges, read when it is first needed.

        Raises:
            UserError: The file is missing or broken.
        """
        if self._scorer is None:
            from lit_agentrl.knowledge import FactScorer, KnowledgeGraph, join, notes_part

            graph, top, hops = self._options
            known = join([notes_part()]) if graph is None else KnowledgeGraph.load(graph)
            self._scorer = FactScorer(known, top=top, hops=hops)
        return self._scorer
