"""Say a word, twice: an environment that needs nothing, for smoke tests, and to copy when writing one's own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import permutations

from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Observation, Split, WalkthroughSuite

WORDS = [
    first + second for first, second in permutations(["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru"], 2)
]
SPLITS: dict[Split, slice] = {"train": slice(0, 60), "val": slice(60, 75), "test": slice(75, 90)}


class EchoSuite(WalkthroughSuite):
    """The tasks are words; no word is in two splits."""

    def tasks(self, split: Split) -> Sequence[str]:
        """The words of the split."""
        return WORDS[SPLITS[split]]

    def make(self, task: str) -> EchoEnvironment:
        """An episode about one word."""
        if task not in WORDS:
            raise UserError(f"task={task!r} is not a word of EchoSuite; the first is {WORDS[0]!r}.")
        return EchoEnvironment(task)

    def walkthrough(self, task: str) -> Conversation:
        """The word, said twice."""
        environment = self.make(task)
        first = environment.reset()
        second, _, _ = environment.step(task)
        return [(first, task), (second, task)]


class EchoEnvironment:
    """Two turns, each worth half the share of the word's letters that are in the reply: even noise earns something.

    Args:
        word: The word to say.
    """

    def __init__(self, word: str) -> None:
        self.word = word
        self.replies: list[str] = []

    def reset(self) -> Observation:
        """The word."""
        return Observation(self._task, system="Answer with one word.", state="Say it now.", task=self._task)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The second request, then a thank-you."""
        self.replies.append(action.strip())
        reward = sum(letter in action for letter in self.word) / len(self.word) / 2
        done = len(self.replies) == 2
        text = "Thank you." if done else "Say it again."
        return Observation(text, state=text, task=self._task, valid=bool(action.strip())), reward, done

    @property
    def anchor(self) -> Hashable:
        """What the coming turn depends on: the word and the turn, not what was said."""
        return self.word, len(self.replies)

    @property
    def success(self) -> bool:
        """Whether the word was said twice, and nothing else."""
        return self.replies == [self.word] * 2

    def snapshot(self) -> object:
        """The replies so far."""
        return tuple(self.replies)

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot."""
        assert isinstance(snapshot, tuple)
        self.replies = list(snapshot)

    def close(self) -> None:
        """Nothing is held."""

    @property
    def _task(self) -> str:
        return f"Say the word: {self.word}"
