"""Which tasks an iteration rolls out: a cursor over endless shuffled passes through a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt


class PromptCursor:
    """Numbers the tasks of endless passes: prompt n is task `permutation(seed, n // N)[n % N]` of N tasks.

    Its whole state is `position`, the next number, so a resumed run continues where the checkpoint was taken.
    """

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        if not tasks:
            raise UserError("The train split has no tasks: check the environment's options.")
        self.tasks = list(tasks)
        self.seed = seed
        self.position = 0

    def at(self, number: int) -> Prompt:
        """The prompt with this running number."""
        epoch, place = divmod(number, len(self.tasks))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.tasks))
        return Prompt(self.tasks[int(order[place])], number)
