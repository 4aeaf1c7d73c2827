"""EZPoints and Points24 of gym-cards: make a formula of all the cards, token by token, that is worth the target."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations_with_replacement
from threading import Lock
from typing import ClassVar

from lit_agentrl.envs.actions import ActionFormat, check_action_format
from lit_agentrl.envs.cards import ranks_of, value
from lit_agentrl.envs.formula import make_target
from lit_agentrl.envs.points_episode import PointsEnvironment
from lit_agentrl.envs.seeded import SeededTasks, refuse_held_out, replay
from lit_agentrl.envs.sprites import ObservationKind, check_observation
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation, Split, WalkthroughSuite

_SEARCH = Lock()  # many threads ask at once when an iteration starts; one of them searches


class PointsSuite(WalkthroughSuite):
    """Cards with which the target can be made. No split has the numbers of another, whatever their order or faces.

    The policy adds one token a step: the number of a card that is left, an operator, a bracket, or `=`, which ends the
    episode. What can not stand at that place, or uses a card twice, is not `valid`, changes nothing and pays
    `invalid_reward`. `=` is offered wherever the formula could end, also while cards are left, and then it is wrong.

    Args:
        num_train: Training tasks.
        num_val: Validation tasks.
        num_test: Test tasks.
        faces_as_ten: J, Q and K count 10; else 11, 12 and 13.
        disjoint: Keep the numbers of the splits apart; else they differ in seeds alone, as those of the original do.
        observation: `text` or `image` (the cards with the formula below).
        scale: Pixels of the picture for each of the 5 x 7 of a digit.
        action_format: What a reply has to look like.
        solved_reward: Paid for `=` after a formula that uses every card and is worth the target.
        wrong_reward: Paid for `=` after any other.
        invalid_reward: Paid for a reply that is no possible token.

    Raises:
        UserError: An argument is out of range.
    """

    num_cards: ClassVar[int]
    target: ClassVar[int]
    operators: ClassVar[str]

    def __init__(
        self,
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 128,
        faces_as_ten: bool = True,
        disjoint: bool = True,
        observation: ObservationKind = "text",
        scale: int = 4,
        action_format: ActionFormat = "plain",
        solved_reward: float = 10.0,
        wrong_reward: float = 0.0,
        invalid_reward: float = 0.0,
    ) -> None:
        check_action_format(action_format)
        check_observation(observation)
        if not 1 <= scale <= 32:
            raise UserError(f"scale={scale} is out of range: allowed are 1 to 32.")
        self._tasks = SeededTasks(num_train, num_val, num_test)
        self._faces_as_ten = faces_as_ten
        self._disjoint = disjoint
        self._scale = scale if observation == "image" else 0
        self._action_format: ActionFormat = action_format
        self._rewards = solved_reward, wrong_reward, invalid_reward

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's tasks, the same however many the other splits have."""
        return self._tasks.ids(split)

    def make(self, task: str) -> PointsEnvironment:
        """A fresh episode with the task's cards."""
        return PointsEnvironment(
            self._cards(task),
            target=self.target,
            operators=self.operators,
            faces_as_ten=self._faces_as_ten,
            scale=self._scale,
            action_format=self._action_format,
            rewards=self._rewards,
        )

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """The tokens of a right formula, then `=`.

        Args:
            task: The cards.
            held_out: Allow a task that is not of the train split.

        Raises:
            UserError: The task is held out and `held_out` is False, so that no demonstration leaks by accident.
        """
        refuse_held_out(task, held_out)
        numbers = [value(rank, self._faces_as_ten) for rank in self._cards(task)]
        tokens = make_target(numbers, self.target, self.operators)
        assert tokens is not None
        return replay(self.make(task), [*tokens, "="], self._action_format)

    def numbers(self, split: Split) -> Sequence[tuple[int, ...]]:
        """The sets of numbers that the split draws from: 3/5 of all that make the target train, 1/5 val, 1/5 test."""
        with _SEARCH:
            every = solvable(self.num_cards, 10 if self._faces_as_ten else 13, self.target, self.operators)
        if not self._disjoint:
            return every
        shares = {"train": (0, 1, 2), "val": (3,), "test": (4,)}[split]
        return [numbers for place, numbers in enumerate(every) if place % 5 in shares]

    def _cards(self, task: str) -> tuple[str, ...]:
        split, seed = self._tasks.seed(task)
        rng = random.Random(seed)
        numbers = list(rng.choice(self.numbers(split)))
        rng.shuffle(numbers)
        return tuple(rng.choice(ranks_of(number, self._faces_as_ten)) for number in numbers)


class EZPointsSuite(PointsSuite):
    """Two cards, `+` and `*`, 12 to make.

    Only 7 pairs of numbers make 12 (2 6, 2 10, 3 4, 3 9, 4 8, 5 7, 6 6): 5 train, 1 is for val and 1 for test. That is
    little to tell generalisation by; `disjoint: false` plays all pairs in all splits.
    """

    num_cards = 2
    target = 12
    operators = "+*"


class Points24Suite(PointsSuite):
    """Four cards, the four operators and brackets, 24 to make: 566 sets of numbers up to 10 do.

    They are searched for once in a process, when the first task is made, in about two seconds.
    """

    num_cards = 4
    target = 24
    operators = "+-*/"


@cache
def solvable(num_cards: int, highest: int, target: int, operators: str) -> list[tuple[int, ...]]:
    """Every set of numbers from 1 to `highest` that makes the target, in an order that mixes them."""
    sets = combinations_with_replacement(range(1, highest + 1), num_cards)
    found = [numbers for numbers in sets if make_target(numbers, target, operators)]
    random.Random(0).shuffle(found)  # in their own order, neighbours share their first numbers
    return found
