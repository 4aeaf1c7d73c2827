"""Conversations and questions about synthetic lesions; answers are true, or wrong on purpose and on record."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lit_agentrl.envs.dermatology.lesion_attributes import Lesion
from lit_agentrl.envs.dermatology.samples import ImageSource, Sample
from lit_agentrl.envs.dermatology.synthetic_answers import KINDS, OPENING, QUESTIONS, Answer, Facts, compose, corrupt
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions
from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import KnowledgeGraph, facts
from lit_agentrl.types import Split


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    kind: str
    """One of `KINDS`."""
    question: str
    answer: Answer


@dataclass(frozen=True)
class LesionTalk:
    """A conversation about one lesion."""

    sample: Sample
    lesion: Lesion
    turns: tuple[Turn, ...]

    def provenance(self) -> dict[str, object]:
        """Where it is from, and which answers hold a wrong fact."""
        errors = [
            {"turn": number, "kind": turn.kind, **vars(turn.answer.error)}
            for number, turn in enumerate(self.turns)
            if turn.answer.error is not None
        ]
        return {"source": "synthetic", "image": self.sample.id, "disease": self.lesion.label, "errors": errors}


def talks(
    lesions: SyntheticLesions,
    split: Split,
    error_rate: float,
    most_turns: int,
    seed: int = 0,
    known: Facts = facts,
) -> list[LesionTalk]:
    """A conversation about every lesion of a split.

    It opens with the disease's name, its features or its treatment, in turns over the lesions of each disease, and goes
    on with up to `most_turns` - 1 other questions.

    Args:
        lesions: Whose pictures are talked about.
        split: Which of them.
        error_rate: Probability that an answer gets a wrong fact.
        most_turns: The longest conversation.
        seed: Of questions, wording and errors.
        known: What is known of a disease.

    Raises:
        UserError: A number is out of range.
    """
    if not 0 <= error_rate <= 1:
        raise UserError(f"error_rate={error_rate} is out of range: allowed are 0 (none) to 1 (every answer).")
    if not 1 <= most_turns <= len(KINDS):
        raise UserError(f"most_turns={most_turns} is out of range: allowed are 1 to {len(KINDS)}.")
    found = []
    pairs = zip(lesions.samples(split), lesions.lesions(split), strict=True)
    for number, (sample, lesion) in enumerate(pairs):
        rng = random.Random(f"synthetic talk {seed} {lesion.key}")
        faults = random.Random(f"synthetic errors {seed} {lesion.key}")  # apart: without errors, the rest is the same
        first = OPENING[number // len(lesions.labels) % len(OPENING)]
        others = rng.sample([kind for kind in KINDS if kind != first], rng.randint(1, most_turns) - 1)
        turns = []
        for kind in (first, *others):
            answer = compose(kind, lesion, known, rng)
            if faults.random() < error_rate:
                answer = corrupt(answer, lesion, known, random.Random(faults.getrandbits(32)))
            turns.append(Turn(kind, rng.choice(QUESTIONS[kind]), answer))
        found.append(LesionTalk(sample, lesion, tuple(turns)))
    return found


class SyntheticQuestions(ImageSource):
    """Every synthetic lesion with one question each of disease name, clinical features and treatment, truly answered.

    For evaluation after conversational training: the wording of questions is that of the conversations, the images of
    a held-out split are not.

    Args:
        lesions: The pictures.
        graph: A knowledge graph's file (`.graphml`, `.parquet`) that knows the seven diseases; None for the built-in
            notes.
        seed: Of the wording.

    Raises:
        UserError: The graph cannot be read, or does not know a disease.
    """

    def __init__(self, lesions: SyntheticLesions, graph: str | None = None, seed: int = 0) -> None:
        self.lesions, self.seed, self._known = lesions, seed, known_facts(graph)

    @property
    def labels(self) -> Sequence[str]:
        """The seven diseases."""
        return self.lesions.labels

    def samples(self, split: Split) -> Sequence[Sample]:
        """Three samples a lesion, the kind of question at the end of the id: `synthetic-test-0-treatment`."""
        return list(self._asked(split))

    def _asked(self, split: Split) -> Iterator[Sample]:
        for kind in OPENING:  # so that any first so many are of all labels
            for sample, lesion in zip(self.lesions.samples(split), self.lesions.lesions(split), strict=True):
                rng = random.Random(f"synthetic question {self.seed} {lesion.key} {kind}")
                answer = compose(kind, lesion, self._known, rng).text()
                question = rng.choice(QUESTIONS[kind])
                yield replace(sample, id=f"{sample.id}-{kind}", question=question, answer=answer)


def known_facts(graph: str | None) -> Facts:
    """What a graph's file says of a disease, or the built-in notes.

    Raises:
        UserError: The file cannot be read, or does not know one of the seven diseases.
    """
    if graph is None:
        return facts
    loaded = KnowledgeGraph.load(graph)
    for disease in SyntheticLesions(0, 0, 0).labels:
        loaded.disease(disease)
    return lru_cache(maxsize=None)(loaded.objects)
