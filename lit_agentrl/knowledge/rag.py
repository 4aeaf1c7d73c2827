"""Answers with the graph's knowledge in the prompt (KG-RAG), by whatever generates text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.graph import KnowledgeGraph, UnknownDiseaseError
from lit_agentrl.knowledge.retrieval import TOP, kg_prompt, retrieve
from lit_agentrl.knowledge.schema import Edge
from lit_agentrl.knowledge.similarity import BM25Similarity, Similarity

log = logging.getLogger(__name__)

Generate = Callable[[Sequence[str]], Sequence[str]]
"""Answers to prompts, in their order: an engine with its chat template, a server, a test's list."""


@dataclass(frozen=True, slots=True)
class GroundedAnswer:
    """An answer and what it was given."""

    text: str
    prompt: str
    edges: tuple[Edge, ...]
    """The facts in the prompt; none where the graph lacks the disease."""


class GroundedPrompts:
    """Writes prompts that hold what the graph knows; diseases that it lacks are counted.

    Args:
        graph: What is known.
        top: At most so many facts a prompt.
        hops: How far the neighbourhood goes.
        threshold: The least similarity of a fact; None for the similarity's own.
        similarity: How facts are retrieved.
        skip_unknown: Write the question with the disease's name alone where the graph lacks it, and count it; otherwise
            that is an error.
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        top: int = TOP,
        hops: int = 1,
        threshold: float | None = None,
        similarity: Similarity | None = None,
        skip_unknown: bool = True,
    ) -> None:
        self._graph, self._skip_unknown = graph, skip_unknown
        self._options = top, hops, threshold, similarity or BM25Similarity()
        self.unknown: Counter[str] = Counter()
        """How often each disease that the graph lacks was asked about."""

    def __call__(self, question: str, disease: str) -> tuple[str, tuple[Edge, ...]]:
        """The prompt, and the facts in it.

        Raises:
            UnknownDiseaseError: The graph has no facts about the disease, and those are not skipped.
        """
        try:
            edges = tuple(retrieve(self._graph, disease, question, *self._options))
        except UnknownDiseaseError as error:
            if not self._skip_unknown:
                raise
            if disease not in self.unknown:
                log.warning("asked without facts: %s", error)
            self.unknown[disease] += 1
            edges = ()
        return kg_prompt(edges, question, disease), edges


def grounded_answers(
    prompts: GroundedPrompts, generate: Generate, questions: Sequence[str], diseases: Sequence[str]
) -> list[GroundedAnswer]:
    """One answer a question, generated in one call.

    Raises:
        UserError: There are not as many diseases as questions, or `generate` gives another number of answers.
    """
    if len(questions) != len(diseases):
        raise UserError(f"{len(questions)} questions and {len(diseases)} diseases: give one disease for each question.")
    asked = [prompts(question, disease) for question, disease in zip(questions, diseases, strict=True)]
    texts = generate([prompt for prompt, _ in asked]) if asked else []
    if len(texts) != len(asked):
        raise UserError(f"`generate` gave {len(texts)} answers to {len(asked)} prompts: it should give one for each.")
    return [GroundedAnswer(text, prompt, edges) for text, (prompt, edges) in zip(texts, asked, strict=True)]
