"""Answers about diseases, judged by a knowledge graph: S(y) of docs/knowledge_graph.md with the label they name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lit_agentrl.envs.dermatology.facts import GraphFacts
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.errors import UserError
from lit_agentrl.preferences.answers import Answer
from lit_agentrl.preferences.source import MiningSource
from lit_agentrl.types import TrajectoryGroup

if TYPE_CHECKING:
    from lit_agentrl.knowledge import Edge, FactScorer

log = logging.getLogger(__name__)


class Labelled(Protocol):
    """What a task is about."""

    @property
    def label(self) -> str:
        """The disease."""
        ...


@runtime_checkable
class DiseaseSuite(Protocol):
    """A suite whose tasks are each about a disease (`RecognitionSuite`, `ConversationSuite`)."""

    def sample(self, task: str) -> Labelled:
        """What the task is about."""
        ...


class AnswerJudge:
    """Scores answers to a suite's questions.

    An answer names a label where one disease of the suite stands in it, thoughts left aside; one that names none, or
    several, is neither right nor wrong as far as its label goes.

    Args:
        graph: A file; None for the built-in notes.
        top: Facts that a question asks for.
        hops: How far around the disease they are looked for.
    """

    def __init__(self, graph: str | None = None, top: int = 8, hops: int = 1) -> None:
        if top < 1 or hops < 1:
            raise UserError(f"top={top}, hops={hops}: must be at least 1.")
        if graph is not None and not Path(graph).is_file():
            raise UserError(
                f"graph={graph!r} is no file. `lit-agentrl build-kg` makes one; null takes the built-in notes."
            )
        self._facts = GraphFacts(graph, top, hops)
        self._parser: AnswerParser | None = None
        self._labels: dict[str, str] = {}
        self.path = graph

    @property
    def scorer(self) -> FactScorer:
        """What judges facts."""
        return self._facts.scorer

    def origin(self) -> Mapping[str, Any]:
        """The graph by name and content."""
        return {"graph": self.path or "built-in notes", "sha256": self.scorer.graph.sha256}

    def check(self, source: MiningSource) -> None:
        """See what diseases the tasks are about.

        Raises:
            UserError: The suite does not say, or the graph has no facts about one of them.
        """
        suite: object = source.environment
        if not isinstance(suite, DiseaseSuite):
            raise UserError(
                f"{type(suite).__name__} does not say which disease a task is about, which a knowledge graph needs: "
                "use RecognitionSuite or ConversationSuite, or a miner that goes by rewards."
            )
        labels = {suite.sample(task).label for task in source.environment.tasks("train")}
        if "" in labels:
            log.warning("Tasks without a disease give no pair: what is true of them is not known.")
        known = sorted(labels - {""})
        if unknown := [label for label in known if not self.scorer.knows(label)]:
            raise UserError(
                f"The knowledge graph ({self.path or 'built-in notes'}) has no facts about {', '.join(unknown)}. Add "
                "them to it (`lit-agentrl build-kg`), or take these diseases out of the source's labels."
            )
        self._parser = AnswerParser(known, strict=False) if len(known) > 1 else None

    def disease(self, source: MiningSource, task: str) -> str:
        """What a task is about; empty where that is not known."""
        suite: object = source.environment
        assert isinstance(suite, DiseaseSuite), "`check` refuses others"
        return suite.sample(task).label

    def said(self, reply: str) -> str:
        """What counts of a reply: its answer, without thoughts."""
        return reply if self._parser is None else self._parser.answer(reply) or ""

    def answer(self, reply: str, disease: str, question: str, has_fault: bool = False, **origin: Any) -> Answer:
        """A reply with its score, S(y); `origin` goes into its provenance."""
        from lit_agentrl.knowledge import answer_score

        said = self.said(reply)
        label = None if self._parser is None else self._parser.match(said)
        found = answer_score(said, label, disease, self.scorer, question, has_format_fault=has_fault)
        is_correct = None if label is None else found.is_correct
        return Answer(reply, found.total, is_correct, {**origin, "parts": dict(found.parts())})

    def answers(self, group: TrajectoryGroup, disease: str, question: str) -> list[Answer]:
        """The replies of a group's healthy episodes; a cut one, or one of bad form, has a fault."""
        return [
            self.answer(
                trajectory.steps[0].action,
                disease,
                question,
                trajectory.steps[0].finish == "length" or trajectory.metrics.get("format_ok") == 0.0,
                trajectory=i,
            )
            for i, trajectory in enumerate(group.trajectories)
            if trajectory.steps and not trajectory.stop_reason.is_failure
        ]


def edge_records(edges: Sequence[Edge]) -> list[list[str]]:
    """Facts as JSON holds them: subject, relation, object, and where they are from."""
    return [[*edge.triple, edge.source, edge.reference] for edge in edges]
