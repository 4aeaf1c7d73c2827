"""Conversations about synthetic lesions for the SFT stage, with a known share of wrong facts."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.envs.dermatology.conversation import CONVERSATION_PROMPT
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions
from lit_agentrl.envs.dermatology.synthetic_questions import LesionTalk, known_facts, talks
from lit_agentrl.types import Conversation, Observation, Split

log = logging.getLogger(__name__)


class LesionConversations(ConversationSource):
    """Questions about synthetic lesions: the disease's name, its features, its treatment, and what people ask next.

    Answers are made from the picture's attributes and the knowledge graph's facts. **A share of them, `error_rate`, is
    made wrong on purpose**: one fact is replaced by another disease's. Conversations that people or models wrote hold
    errors; synthetic ones would not, and then there would be nothing for preference training to repair. Which answers
    are wrong, and how, is in `records`. With 0 all are true.

    Args:
        lesions: The pictures, and how many.
        split: Never use the one you evaluate on.
        error_rate: Probability that an answer gets a wrong fact; 0 for clean text.
        most_turns: The longest conversation, in questions.
        system: The system prompt; by default the one of `ConversationSuite`.
        graph: A knowledge graph's file (`.graphml`, `.parquet`); None for the built-in notes.
        seed: Of questions, wording and errors.

    Raises:
        UserError: A number is out of range, or the graph cannot be read or does not know a disease.
    """

    def __init__(
        self,
        lesions: SyntheticLesions,
        split: Split = "train",
        error_rate: float = 0.15,
        most_turns: int = 2,
        system: str = CONVERSATION_PROMPT,
        graph: str | None = None,
        seed: int = 0,
    ) -> None:
        self.system, self.error_rate = system, error_rate
        self.records: list[LesionTalk] = talks(lesions, split, error_rate, most_turns, seed, known_facts(graph))
        """The conversations with what they were made from, `provenance()` included."""

    @property
    def num_answers(self) -> int:
        """Answers in all conversations."""
        return sum(len(record.turns) for record in self.records)

    @property
    def num_errors(self) -> int:
        """Answers that hold a wrong fact."""
        return sum(turn.answer.error is not None for record in self.records for turn in record.turns)

    def conversations(self) -> Iterable[Conversation]:
        """One conversation a lesion; its first question shows the picture."""
        log.info(
            "Synthetic conversations: %d answers, %d with a wrong fact put in on purpose (error_rate=%g).",
            self.num_answers,
            self.num_errors,
            self.error_rate,
        )
        return map(self._conversation, self.records)

    def _conversation(self, record: LesionTalk) -> Conversation:
        turns = []
        for number, turn in enumerate(record.turns):
            images = (record.sample.shown(),) if number == 0 else ()
            observation = Observation(turn.question, self.system if number == 0 else "", images=images)
            turns.append((observation, turn.answer.text()))
        return turns
