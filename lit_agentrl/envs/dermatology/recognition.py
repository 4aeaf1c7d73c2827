"""Recognise a disease: an image and a question, thoughts, and one name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_agentrl.envs.dermatology.form import Form
from lit_agentrl.envs.dermatology.hints import Hint
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.envs.dermatology.prompts import HEADINGS, LONG_PROMPT, QUESTION, SHORT_PROMPT, system_prompt
from lit_agentrl.envs.dermatology.samples import ImageSource, Sample
from lit_agentrl.envs.dermatology.scores import Prediction, recognition_summary
from lit_agentrl.envs.dermatology.tasks import SampleTasks, check_tag
from lit_agentrl.envs.seeded import refuse_held_out
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Observation, Split, Trajectory, TrajectoryGroup, WalkthroughSuite

RECOGNITION = "recognition"
"""The kind of these tasks."""


@dataclass(frozen=True)
class Payment:
    """What a reply earns: the first of `accuracy` where its label is right, else the second; and its form.

    The authors' published code has 7 and -1 with `format_scale` 2, of which its committed configuration uses the first
    alone.
    """

    accuracy: tuple[float, float]
    format_scale: float

    def pay(self, is_right: bool, form: float) -> float:
        """The reward for a reply whose form scored `form`."""
        return self.accuracy[0 if is_right else 1] + self.format_scale * form


class RecognitionSuite(WalkthroughSuite):
    """Images whose disease is to be named, as stage 1 of DermIQ-VLM trains it (arXiv 2510.01236).

    An episode is one turn: the system prompt lists the allowed names, the answer stands in its tag, and what counts is
    read from the reply alone. A cut reply is wrong: let the rollout pass it on (`cut_actions: continue`), so that it
    is paid like one.

    Args:
        source: Where the images come from.
        style: The standard prompt: `short` (under 80 tokens of SmolLM2 with seven names), or `long`, which asks for
            three numbered headings as the authors' published code does.
        prompt: A system prompt of one's own, with the places {labels}, {think}, {answer} and {headings}; None for the
            standard one.
        question: Asked where a sample brings no question.
        headings: What thoughts should name; None for those of the long prompt, where that is the style.
        think_tag: What thoughts stand in. The authors' code has `thinking`; what the paper has is not known.
        answer_tag: What the answer stands in.
        strict: An answer needs its tag; otherwise a reply without one is searched whole.
        synonyms: Further words for a label, beside the standard ones.
        accuracy: Paid for a right and for any other answer; the authors' code has [7, -1].
        format_scale: Factor of the form's score, which is at most 1, and -0.5 if malformed; the authors' code has 2.
        hint: Shows some training tasks a short list of names with the right one in it; None for never.

    Raises:
        UserError: An option is unknown or out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        style: Literal["short", "long"] = "short",
        prompt: str | None = None,
        question: str = QUESTION,
        headings: Sequence[str] | None = None,
        think_tag: str = "think",
        answer_tag: str = "answer",
        strict: bool = True,
        synonyms: dict[str, list[str]] | None = None,
        accuracy: tuple[float, float] = (1.0, 0.0),
        format_scale: float = 0.0,
        hint: Hint | None = None,
    ) -> None:
        if style not in ("short", "long"):
            raise UserError(f"style={style!r} is unknown; allowed are short and long.")
        if not accuracy[0] > accuracy[1] or format_scale < 0:
            raise UserError(
                f"accuracy={list(accuracy)}, format_scale={format_scale}: a right answer must pay more than another "
                "one, and form never less than nothing."
            )
        check_tag("think_tag", think_tag)
        check_tag("answer_tag", answer_tag)
        if think_tag == answer_tag:
            raise UserError(f"think_tag and answer_tag are both {answer_tag!r}: they must differ.")
        asked = (HEADINGS if style == "long" and prompt is None else ()) if headings is None else tuple(headings)
        self._tasks = SampleTasks(source)
        self._template = prompt or (LONG_PROMPT if style == "long" else SHORT_PROMPT)
        self._question, self._synonyms, self._strict, self._hint = question, synonyms, strict, hint
        self._form = Form(think_tag, answer_tag, asked)
        self._payment = Payment((float(accuracy[0]), float(accuracy[1])), float(format_scale))
        self.stop_strings = (f"</{answer_tag}>",) if strict else ()
        self._ready: tuple[AnswerParser, str] | None = None

    @property
    def labels(self) -> Sequence[str]:
        """The names that can be answered."""
        return self._tasks.labels

    @property
    def parser(self) -> AnswerParser:
        """Reads answers."""
        return self._parts()[0]

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's images; any first so many are as balanced over labels as the split allows."""
        self._parts()  # a label without words, or a template without places, should end the run here
        return self._tasks.ids(split)

    def make(self, task: str) -> RecognitionEnvironment:
        """A fresh episode about an image."""
        sample = self.sample(task)
        parser, system = self._parts()
        question = sample.question or self._question
        if self._hint is not None and task.startswith("train-"):
            question = self._hint.add(question, task, sample.label, self.labels)
        return RecognitionEnvironment(task, sample, question, system, parser, self._form, self._payment)

    def kind(self, task: str) -> str:
        """Always the same, beside other kinds of a panel."""
        return RECOGNITION

    def sample(self, task: str) -> Sample:
        """The image and its label."""
        return self._tasks.sample(task)

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """A right answer in the right form; what it reasons with is what the source says of the image, if anything.

        Args:
            task: The image.
            held_out: Allow an image that is not of the train split.

        Raises:
            UserError: The image is held out and `held_out` is False, so that no demonstration leaks by accident.
        """
        refuse_held_out(task, held_out)
        sample, form = self.sample(task), self._form
        thoughts = sample.findings or f"It looks like {sample.label}."
        reply = f"<{form.think_tag}>{thoughts}</{form.think_tag}><{form.answer_tag}>{sample.label}</{form.answer_tag}>"
        return [(self.make(task).reset(), reply)]

    def summary(self, groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
        """Accuracy, macro scores, recall of each label and the share of unparsable answers; see `scores`."""
        predictions = [
            Prediction(self.sample(group.prompt_id).label, tuple(map(self.predicted, healthy)))
            for group in groups
            if (healthy := [t for t in group.trajectories if not t.stop_reason.is_failure])
        ]
        is_voted = any(len(group.trajectories) > 1 for group in groups)
        return recognition_summary(predictions, self.labels, is_voted=is_voted)

    def predicted(self, trajectory: Trajectory) -> str | None:
        """The label that a finished episode answered; None where it did not get to an answer, or none could be read."""
        if trajectory.stop_reason.is_truncation or not trajectory.steps:
            return None
        return self.parser(trajectory.steps[-1].action)

    def _parts(self) -> tuple[AnswerParser, str]:
        """What needs the labels, and so the source's files."""
        if self._ready is None:
            form = self._form
            self._ready = (
                AnswerParser(self.labels, self._synonyms, form.think_tag, form.answer_tag, self._strict),
                system_prompt(self._template, self.labels, form.think_tag, form.answer_tag, form.headings),
            )
        return self._ready


class RecognitionEnvironment:
    """One image, one reply.

    Args:
        task: The id of the task.
        sample: The image and its label.
        question: What is asked about it.
        system: The system prompt.
        parser: Reads the answer.
        form: Judges the reply's form.
        payment: What it earns.
    """

    def __init__(
        self,
        task: str,
        sample: Sample,
        question: str,
        system: str,
        parser: AnswerParser,
        form: Form,
        payment: Payment,
    ) -> None:
        self._task, self._sample, self._question, self._system = task, sample, question, system
        self._parser, self._form, self._payment = parser, form, payment
        self._reply: str | None = None

    def reset(self) -> Observation:
        """The image, with the question."""
        return Observation(
            self._question, self._system, state=self._task, task=self._question, images=(self._sample.shown(),)
        )

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """Nothing more is shown: the episode is over. An answer that names no label is not `valid`."""
        self._reply = action
        reward = self._payment.pay(self.success, self._form.score(action))
        return Observation("", state="", task=self._question, valid=self._predicted is not None), reward, True

    @property
    def anchor(self) -> Hashable:
        """The task, and whether it was answered."""
        return self._task, self._reply is not None

    @property
    def success(self) -> bool:
        """Whether the answer is the image's label."""
        return self._predicted == self._sample.label

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the reply: whether it names a label, and whether its form is exact."""
        return {
            "parsed": float(self._predicted is not None),
            "format_ok": float(self._form.is_exact(self._reply or "")),
        }

    @property
    def _predicted(self) -> str | None:
        return None if self._reply is None else self._parser(self._reply)

    def snapshot(self) -> object:
        """The reply, if there is one."""
        return self._reply

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot."""
        assert snapshot is None or isinstance(snapshot, str)
        self._reply = snapshot

    def close(self) -> None:
        """Nothing is held."""
