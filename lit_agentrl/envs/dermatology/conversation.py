"""Talk about a lesion: an image and a question, and an answer in words, whose facts a graph can judge."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from lit_agentrl.envs.dermatology.facts import FactJudge
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.envs.dermatology.samples import ImageSource, Sample
from lit_agentrl.envs.dermatology.splits import in_turns, place
from lit_agentrl.envs.dermatology.tasks import SampleTasks
from lit_agentrl.envs.search.scores import token_f1
from lit_agentrl.envs.seeded import refuse_held_out
from lit_agentrl.errors import UserError
from lit_agentrl.intervals import bootstrap_interval
from lit_agentrl.types import Conversation, Observation, Split, TrajectoryGroup, WalkthroughSuite

CONVERSATION = "conversation"
"""The kind of these tasks."""
CONVERSATION_PROMPT = "Answer the question about the skin lesion in the image."
QUESTIONS = (
    "What is the name of the disease?",
    "What are the clinical features of this lesion?",
    "What is the treatment?",
)
"""The types of question that an evaluation of the authors' dataset asks."""
SHARES = ("support", "contradiction", "coverage")
"""What a judge says of an answer, each in [0, 1]."""


class ConversationSuite(WalkthroughSuite):
    """Questions about images, answered in words, as stages 2 and 3 of DermIQ-VLM train it.

    No answer is right or wrong as a whole: `success` is unknown and nothing is paid. With `facts` each answer is
    judged: `support`, `contradiction` and `coverage` of its facts, and `num_facts`; with a reference answer the F1 of
    its words, `reference_f1`. Thoughts are not judged, and of an answer in its tag what the tag holds.

    Args:
        source: Where the images come from, and the questions where it has such.
        facts: Judges the facts of answers; None for no judge.
        questions: Asked about samples that bring no question, one each, in turns.
        prompt: The system prompt.
        think_tag: What thoughts stand in.
        answer_tag: What an answer may stand in.

    Raises:
        UserError: There is no question, or the judge does not know one of the source's diseases.
    """

    def __init__(
        self,
        source: ImageSource,
        facts: FactJudge | None = None,
        questions: Sequence[str] = QUESTIONS,
        prompt: str = CONVERSATION_PROMPT,
        think_tag: str = "think",
        answer_tag: str = "answer",
    ) -> None:
        if not questions or not all(question.strip() for question in questions):
            raise UserError(f"questions={list(questions)}: at least one is needed, and none may be empty.")
        self._questions, self._prompt, self._facts = tuple(questions), prompt, facts
        self._tags = think_tag, answer_tag
        self._source = source
        self._tasks = SampleTasks(source, self._asked)
        self._parser: AnswerParser | None = None

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's questions, `test-talk/...`, the labels in turns: any first so many are of all."""
        self._check()
        asked = [replace(self._tasks.sample(task), id=task) for task in self._tasks.ids(split)]
        return [sample.id for sample in in_turns(asked, None, seed=0)]

    def has(self, task: str) -> bool:
        """Whether it is a task of this suite."""
        return self._tasks.has(task)

    def make(self, task: str) -> ConversationEnvironment:
        """A fresh episode about a question."""
        sample = self.sample(task)
        self._check()
        assert self._parser is not None
        return ConversationEnvironment(task, sample, self._prompt, self._parser, self._facts)

    def kind(self, task: str) -> str:
        """Always the same, beside other kinds of a panel."""
        return CONVERSATION

    def sample(self, task: str) -> Sample:
        """The image, the question, and what is known of the answer."""
        return self._tasks.sample(task)

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """The question and its reference answer.

        Args:
            task: The question.
            held_out: Allow a question that is not of the train split.

        Raises:
            UserError: There is no reference answer, or the question is held out and `held_out` is False.
        """
        refuse_held_out(task, held_out)
        answer = self.sample(task).answer
        if not answer:
            raise UserError(f"{task!r} has no reference answer, so there is nothing to show.")
        return [(self.make(task).reset(), answer)]

    def summary(self, groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
        """Means over questions with their intervals; a question with several episodes counts their mean."""
        names = (*SHARES, "num_facts") if self._facts is not None else ()
        found: dict[str, float] = {}
        for name in (*names, "reference_f1"):
            values = [value for group in groups if (value := _mean(group, name)) is not None]
            found[name] = math.fsum(values) / len(values) if values else math.nan
            if name != "num_facts":
                found[f"{name}_low"], found[f"{name}_high"] = bootstrap_interval(values)
        return found | {"num_answered": float(sum(_is_answered(group) for group in groups))}

    def _asked(self, sample: Sample) -> Sequence[tuple[str, Sample]]:
        """One question a sample: its own, or one of those given, which one a hash of its id decides."""
        question = sample.question
        if question is None:
            question = self._questions[place(0, sample.id) % len(self._questions)]
        return [(f"talk/{sample.id}", replace(sample, question=question))]

    def _check(self) -> None:
        if self._parser is not None:
            return
        labels = self._source.labels
        facts = self._facts
        if facts is not None and (unknown := [label for label in labels if not facts.knows(label)]):
            raise UserError(
                f"The knowledge graph has no facts about {', '.join(unknown)}. Add them to it, or take these diseases "
                "out of the source's labels."
            )
        self._parser = AnswerParser(labels, None, *self._tags, strict=False)


class ConversationEnvironment:
    """One question, one answer.

    Args:
        task: The id of the task.
        sample: The image, the question, and what is known of the answer.
        system: The system prompt.
        parser: Finds the answer in a reply.
        facts: Judges its facts; None for no judge.
    """

    def __init__(
        self, task: str, sample: Sample, system: str, parser: AnswerParser, facts: FactJudge | None = None
    ) -> None:
        self._task, self._sample, self._system, self._parser, self._facts = task, sample, system, parser, facts
        self._question = sample.question or ""
        self._reply: str | None = None
        self._metrics: dict[str, float] = {}

    def reset(self) -> Observation:
        """The image, with the question."""
        return Observation(
            self._question, self._system, state=self._task, task=self._question, images=(self._sample.shown(),)
        )

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """Nothing more is shown: the episode is over. An empty answer is not `valid`."""
        self._take(action)
        return Observation("", state="", task=self._question, valid=bool(self._answer)), 0.0, True

    @property
    def anchor(self) -> Hashable:
        """The task, and whether it was answered."""
        return self._task, self._reply is not None

    @property
    def success(self) -> None:
        """Not known: an answer in words is not right or wrong as a whole."""
        return

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured of the answer; nothing before there is one."""
        return self._metrics

    def snapshot(self) -> object:
        """The reply, if there is one."""
        return self._reply

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot."""
        assert snapshot is None or isinstance(snapshot, str)
        self._take(snapshot)

    def close(self) -> None:
        """Nothing is held."""

    @property
    def _answer(self) -> str:
        return (self._parser.answer(self._reply) or "") if self._reply is not None else ""

    def _take(self, reply: str | None) -> None:
        self._reply, self._metrics = reply, {}
        if reply is None:
            return
        if self._facts is not None and self._sample.label:
            judged = self._facts.score(self._answer, self._sample.label, self._question)
            self._metrics |= {name: float(getattr(judged, name)) for name in (*SHARES, "num_facts")}
        if self._sample.answer:
            self._metrics["reference_f1"] = token_f1(self._answer, [self._sample.answer])


def _mean(group: TrajectoryGroup, name: str) -> float | None:
    """The mean over a question's episodes; None where none measured it."""
    values = [t.metrics[name] for t in group.trajectories if not t.stop_reason.is_failure and name in t.metrics]
    return math.fsum(values) / len(values) if values else None


def _is_answered(group: TrajectoryGroup) -> bool:
    return any(not t.stop_reason.is_failure for t in group.trajectories)
