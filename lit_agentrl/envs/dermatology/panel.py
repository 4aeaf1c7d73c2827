"""One panel for every stage: held-out images to recognise, and questions about held-out images to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

from lit_agentrl.envs.dermatology.conversation import CONVERSATION, ConversationEnvironment, ConversationSuite
from lit_agentrl.envs.dermatology.recognition import RECOGNITION, RecognitionEnvironment, RecognitionSuite
from lit_agentrl.errors import UserError
from lit_agentrl.types import EnvironmentSuite, Split, TrajectoryGroup


class DermatologyPanel(EnvironmentSuite):
    """Recognition and conversation side by side, so that one evaluation measures both, each by its own numbers.

    In val and test the two kinds take turns, so that any first so many tasks hold both. In train there is recognition
    alone: a conversation pays nothing to learn from.

    Args:
        recognition: Images whose disease is to be named.
        conversation: Questions about images.
        num_recognition: The first so many recognition tasks of val and of test; None for all.
        num_conversation: The same for conversations.

    Raises:
        UserError: A number is below 1, or the two suites have a task of one name.
    """

    def __init__(
        self,
        recognition: RecognitionSuite,
        conversation: ConversationSuite,
        num_recognition: int | None = None,
        num_conversation: int | None = None,
    ) -> None:
        for name, count in (("num_recognition", num_recognition), ("num_conversation", num_conversation)):
            if count is not None and count < 1:
                raise UserError(f"{name}={count} must be at least 1, or null for all tasks.")
        self.recognition, self.conversation = recognition, conversation
        self._counts = num_recognition, num_conversation
        self.stop_strings = recognition.stop_strings

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's tasks, the two kinds in turns."""
        if split == "train":
            return self.recognition.tasks(split)
        named, asked = self.recognition.tasks(split), self.conversation.tasks(split)
        if both := sorted(set(named) & set(asked)):
            raise UserError(f"{both[0]!r} is a task of both suites: give the images of one of them other ids.")
        pairs = zip_longest(named[: self._counts[0]], asked[: self._counts[1]])
        return [task for task in chain.from_iterable(pairs) if task is not None]

    def make(self, task: str) -> RecognitionEnvironment | ConversationEnvironment:
        """A fresh episode of either kind."""
        return self.conversation.make(task) if self.conversation.has(task) else self.recognition.make(task)

    def kind(self, task: str) -> str:
        """`recognition` or `conversation`."""
        return CONVERSATION if self.conversation.has(task) else RECOGNITION

    def summary(self, groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
        """The numbers of both kinds, each over its own tasks; their names do not meet."""
        talks = [group for group in groups if self.conversation.has(group.prompt_id)]
        named = [group for group in groups if not self.conversation.has(group.prompt_id)]
        return {**self.recognition.summary(named), **self.conversation.summary(talks)}
