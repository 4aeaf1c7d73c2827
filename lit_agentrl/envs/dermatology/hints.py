"""Guided prompts: some training tasks are shown a short list of names with the right one in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_agentrl.envs.dermatology.splits import place
from lit_agentrl.errors import UserError


@dataclass(frozen=True)  # no slots: the command line reads defaults from `vars`
class Hint:
    """Which training tasks get a hint, and how narrow it is.

    The first author's thesis speaks of guided prompts, and a comment in the published code of a hint's probability that
    was removed; neither is public, so this is a reconstruction. Which tasks, and which names beside the right one,
    depends on task and seed alone: a group shares its prompt, and a resumed run sees the same. What is held out gets
    none.

    Raises:
        UserError: A number is out of range.
    """

    share: float = 0.5
    """Of the training tasks."""
    num_labels: int = 3
    """Names in the hint, the right one included."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.num_labels < 1:
            raise UserError(
                f"Hint(share={self.share}, num_labels={self.num_labels}): the share must be 0 to 1, and there must "
                "be at least one label."
            )

    def add(self, question: str, task: str, label: str, labels: Sequence[str]) -> str:
        """The question, with the hint where the task gets one."""
        generator = np.random.default_rng([self.seed, place(self.seed, task)])
        if generator.random() >= self.share:
            return question
        others = [name for name in labels if name != label]
        chosen = generator.permutation(len(others))[: self.num_labels - 1]
        names = [label, *(others[index] for index in chosen)]
        shuffled = [names[index] for index in generator.permutation(len(names))]
        return f"{question} Hint: it is {' or '.join(shuffled)}."
