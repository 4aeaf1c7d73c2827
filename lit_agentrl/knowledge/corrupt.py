"""Hard negatives: an answer with one of its true facts turned into a false one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from lit_agentrl.knowledge.answers import Fact
from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.names import name_key
from lit_agentrl.knowledge.scoring import FactScorer


@dataclass(frozen=True, slots=True)
class Corruption:
    """A changed answer, and what was changed."""

    text: str
    original: Fact
    """The true fact; its span is that in the original answer."""
    replacement: Fact
    """The false one that stands there now."""
    other_disease: str
    """Of which the replacement is true."""

    def record(self) -> dict[str, str]:
        """For the provenance of a pair."""
        return {
            "relation": self.original.relation,
            "from": self.original.object,
            "to": self.replacement.object,
            "true_of": self.other_disease,
        }


def corrupt_fact(
    answer: str, graph: KnowledgeGraph, disease: str, rng: random.Random, scorer: FactScorer | None = None
) -> Corruption | None:
    """The answer with one object swapped for one of the same relation that is true of another disease only.

    Diseases that this one is confused with are tried first. The changed answer is scored again: the new fact must be
    read there and contradict the graph, and the old one must be gone; where no swap does that, the result is None.

    Args:
        answer: What a policy or a template wrote.
        graph: What is true.
        disease: What the answer is about.
        rng: Chooses among the swaps.
        scorer: A scorer of this graph; made if it is None, which takes a moment.

    Raises:
        UnknownDiseaseError: The graph has no facts about the disease.
    """
    scorer = scorer or FactScorer(graph)
    name = graph.disease(disease)
    facts = [fact for fact in scorer.score(answer, name, "").supported if fact.subject == name and not fact.is_denied]
    rng.shuffle(facts)
    facts.sort(
        key=lambda fact: name_key(answer[slice(*fact.span)]) != name_key(fact.object)
    )  # stable; `ulcerated` last
    for fact in facts:
        for object, other in _false_objects(graph, name, fact.relation, rng):
            text = _swapped(answer, fact, object)
            score = scorer.score(text, name, "")
            wrong = [new for new in score.contradicted if new.triple == (name, fact.relation, object)]
            if wrong and fact.triple not in {kept.triple for kept in score.supported}:
                return Corruption(text, fact, wrong[0], other)
    return None


def _false_objects(graph: KnowledgeGraph, name: str, relation: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """What others have in this relation and the disease has not, and who has it: first of those it is confused with."""
    own = {*graph.objects(name, relation), name}
    found: dict[str, str] = {}
    near = [node for node in graph.objects(name, "differs_from") if graph.network.out_degree(node)]
    for others in (near, _subjects(graph, relation)):
        fresh: dict[str, str] = {}
        for other in others:
            if other == name or not graph.network.out_degree(other):
                continue
            for object in graph.objects(other, relation):
                if object not in own and object not in found:
                    fresh.setdefault(object, other)
        found |= fresh
        yield from rng.sample(sorted(fresh.items()), len(fresh))


def _subjects(graph: KnowledgeGraph, relation: str) -> list[str]:
    return sorted({edge.subject for edge in graph.edges if edge.relation == relation})


def _swapped(answer: str, fact: Fact, object: str) -> str:
    """The answer with another name in the fact's place, its capital letter and article fitted."""
    start, end = fact.span
    before = answer[:start]
    name = (
        object[0].upper() + object[1:]
        if answer[start].isupper() and answer[start + 1 : start + 2].islower()
        else object
    )
    for article in ("a", "an"):
        for spelled in (article, article.capitalize()):
            if before.endswith(f" {spelled} ") or before == f"{spelled} ":
                fitting = "an" if name[0].lower() in "aeiou" else "a"
                fitting = fitting.capitalize() if spelled[0].isupper() else fitting
                return f"{before[: -len(spelled) - 1]}{fitting} {name}{answer[end:]}"
    return before + name + answer[end:]
