"""Single answers with scores, and the pairs that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_agentrl.images import Image
from lit_agentrl.preferences.candidates import Candidate, Message, prompt_messages
from lit_agentrl.types import TrajectoryGroup


@dataclass(slots=True, frozen=True)
class Answer:
    """One answer to a prompt of one turn."""

    text: str
    score: float
    is_correct: bool | None
    """Whether it is right; None where nothing says so."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Which trajectory it is from, and what its score is made of."""


@dataclass(slots=True, frozen=True)
class Question:
    """What answers are compared for: the prompt as it is stored."""

    task: str
    prompt: list[Message]
    images: tuple[Image, ...] = ()


def asked(group: TrajectoryGroup) -> Question | None:
    """What a group was asked; None where no episode got to an answer, or one took several turns."""
    played = [t for t in group.trajectories if not t.stop_reason.is_failure and t.steps]
    if not played or any(len(t.steps) > 1 for t in played):
        return None
    steps = played[0].steps
    return Question(group.prompt_id, prompt_messages(steps, 0, "rebuild"), steps[0].images)


def best_and_worst(question: Question, answers: Sequence[Answer], mode: str, most: int = 1) -> list[Candidate]:
    """The best answer against the others, the worst first, at most so many.

    An answer known to be wrong is the best only where all are.
    """
    if len(answers) < 2:
        return []
    ranked = sorted(range(len(answers)), key=lambda i: (answers[i].is_correct is False, -answers[i].score, i))
    others = sorted(ranked[1:], key=lambda i: (answers[i].score, i))
    return [pair(question, answers[ranked[0]], answers[i], mode) for i in others[:most]]


def pair(question: Question, chosen: Answer, rejected: Answer, mode: str, **more: Any) -> Candidate:
    """Two answers as a pair; `more` goes into its provenance."""
    return Candidate(
        prompt=question.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        gap=chosen.score - rejected.score,
        is_correct=chosen.is_correct,
        images=question.images,
        provenance={
            "mode": mode,
            "task": question.task,
            "chosen": {**chosen.origin, "score": chosen.score},
            "rejected": {**rejected.origin, "score": rejected.score},
            **more,
        },
    )
