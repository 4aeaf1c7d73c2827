"""Tasks that are seeds: numbered in each split, drawn from ranges that never meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_agentrl.envs.actions import ActionFormat, as_reply
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Environment, Split

SEEDS_PER_SPLIT = 10_000_000
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SeededTasks:
    """The tasks `train-0`, `train-1`, ... of every split.

    Raises:
        UserError: A count is negative or larger than a split's range of seeds.
    """

    num_train: int
    num_val: int
    num_test: int

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if not 0 <= count <= SEEDS_PER_SPLIT:
                raise UserError(f"{name}={count} is out of range: allowed are 0 to {SEEDS_PER_SPLIT}.")

    def ids(self, split: Split) -> Sequence[str]:
        """The split's tasks, the same however many the other splits have."""
        return [f"{split}-{number}" for number in range(self._count(split))]

    def seed(self, task: str) -> tuple[Split, int]:
        """The split and the seed of a task.

        Raises:
            UserError: There is no such task.
        """
        for index, split in enumerate(SPLITS):
            number = task.removeprefix(f"{split}-")
            if number.isdecimal() and task == f"{split}-{int(number)}" and int(number) < self._count(split):
                return split, index * SEEDS_PER_SPLIT + int(number)
        raise UserError(f"task={task!r} is not a task of this suite; a task looks like 'train-0'.")

    def _count(self, split: Split) -> int:
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}[split]


def refuse_held_out(task: str, allowed: bool) -> None:
    """Keep demonstrations of evaluated tasks from leaking by accident.

    Raises:
        UserError: The task is not of the train split and not explicitly allowed.
    """
    if not allowed and not task.startswith("train-"):
        raise UserError(f"task={task!r} is held out: training on its walkthrough would void the evaluation.")


def replay(environment: Environment, actions: Sequence[str], action_format: ActionFormat) -> Conversation:
    """The actions as replies, each with the observation before it."""
    observation, turns = environment.reset(), []
    for action in actions:
        reply = as_reply(action, action_format)
        turns.append((observation, reply))
        observation, _, _ = environment.step(reply)
    return turns
