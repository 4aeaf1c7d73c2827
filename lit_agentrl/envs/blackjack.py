"""Blackjack as Gymnasium plays it (Sutton and Barto, example 5.1): hit or stick against a dealer who draws to 17."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lit_agentrl.envs.actions import ActionFormat, check_action_format, format_hint
from lit_agentrl.envs.cards import draw_rank, value
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.seeded import SeededTasks
from lit_agentrl.envs.sprites import GREEN, Image, ObservationKind, check_observation, draw_cards, stack
from lit_agentrl.errors import UserError
from lit_agentrl.types import EnvironmentSuite, Observation, Split

ACTIONS = ("hit", "stick")
TASK = "Beat the dealer."
LONGEST = 64  # cards: more than any player and dealer can hold without going over 21


@dataclass(frozen=True, slots=True)
class BlackjackRewards:
    """What the end pays; a draw pays 0."""

    win: float
    loss: float
    bust: float
    natural: float


class BlackjackSuite(EnvironmentSuite):
    """Deals from seeds, each split from its own. The deck is endless: every card is as likely at any time.

    The splits share no deck, but they share hands: there are only some 300 of a player's total, with or without an ace
    that counts 11, and a dealer's card, and all of them are dealt in every split. The episodes of a task see the same
    deck in the same order, so what tells the trajectories of a group apart is their play, not their luck. Not every
    deal can be won, so there are no walkthroughs.

    Success is a win. `hit` and `stick` are always `valid`; any other reply changes nothing and pays `invalid_reward`.

    Args:
        num_train: Training deals.
        num_val: Validation deals.
        num_test: Test deals.
        observation: `text` or `image` (the dealer's cards above, yours below).
        scale: Pixels of the picture for each of the 5 x 7 of a digit.
        action_format: What a reply has to look like.
        bust_reward: Paid for going over 21; the verl-agent copy of the game pays 0 here, as for a draw.
        natural_reward: Paid for a win with an ace and a ten in the first two cards; casinos pay 1.5.
        invalid_reward: Paid for a reply that is neither action.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 128,
        observation: ObservationKind = "text",
        scale: int = 4,
        action_format: ActionFormat = "plain",
        bust_reward: float = -1.0,
        natural_reward: float = 1.0,
        invalid_reward: float = 0.0,
    ) -> None:
        check_action_format(action_format)
        check_observation(observation)
        if not 1 <= scale <= 32:
            raise UserError(f"scale={scale} is out of range: allowed are 1 to 32.")
        self._tasks = SeededTasks(num_train, num_val, num_test)
        self._scale = scale if observation == "image" else 0
        self._action_format: ActionFormat = action_format
        self._rewards = BlackjackRewards(1.0, -1.0, bust_reward, natural_reward)
        self._invalid_reward = invalid_reward

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's deals, the same however many the other splits have."""
        return self._tasks.ids(split)

    def make(self, task: str) -> BlackjackEnvironment:
        """A fresh episode of the deal."""
        _, seed = self._tasks.seed(task)
        rng = random.Random(seed)
        return BlackjackEnvironment(
            tuple(draw_rank(rng) for _ in range(LONGEST)),
            rewards=self._rewards,
            invalid_reward=self._invalid_reward,
            scale=self._scale,
            action_format=self._action_format,
        )


class BlackjackEnvironment:
    """One deal: the first two cards of the deck are the dealer's, the next two the player's.

    Args:
        deck: Ranks, in the order they are drawn.
        rewards: What the end pays.
        invalid_reward: Paid for a reply that is no action.
        scale: The size of the pictures; 0 for text.
        action_format: What a reply has to look like.
    """

    def __init__(
        self,
        deck: tuple[str, ...],
        *,
        rewards: BlackjackRewards,
        invalid_reward: float,
        scale: int,
        action_format: ActionFormat,
    ) -> None:
        self._deck = deck
        self._deal = hashlib.sha256(" ".join(deck).encode()).hexdigest()[:16]
        self._rewards = rewards
        self._invalid_reward = invalid_reward
        self._scale = scale
        self._action_format = action_format
        self._num_hits = 0
        self._stuck = False

    def reset(self) -> Observation:
        """The first cards; the rules are the system prompt."""
        picture = "\nThe picture shows the dealer's cards above and yours below." if self._scale else ""
        return self._observe(
            "",
            None,
            "This is blackjack. Get closer to 21 than the dealer without going over. hit takes a card; stick ends "
            "your turn, and the dealer draws until 17. J, Q, K count 10, an ace 11 or 1."
            f"{picture}\n{format_hint(self._action_format)}",
        )

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The cards after the action, what the end pays, and whether it came: by sticking or going over 21."""
        chosen = choose(action, ACTIONS, self._action_format)
        if chosen is None:
            return self._observe("That is not one of the actions.", False), self._invalid_reward, False
        self._num_hits += chosen == "hit"
        self._stuck = chosen == "stick"
        if total(self._player) > 21:
            return self._observe("You went over 21 and lose.", True), self._rewards.bust, True
        if not self._stuck:
            return self._observe("", True), 0.0, False
        margin = total(self._player) - (total(self._dealer) if total(self._dealer) <= 21 else 0)
        won = self._rewards.natural if is_natural(self._player) else self._rewards.win
        reward = won if margin > 0 else self._rewards.loss if margin < 0 else 0.0
        result = "You win." if margin > 0 else "You lose." if margin < 0 else "It is a draw."
        return self._observe(result, True), reward, True

    @property
    def anchor(self) -> Hashable:
        """The deck, and how far it is played."""
        return self._deal, self._num_hits, self._stuck

    @property
    def success(self) -> bool:
        """Whether the player has won."""
        if not self._stuck:
            return False
        return total(self._dealer) > 21 or total(self._player) > total(self._dealer)

    def snapshot(self) -> object:
        """How far the deck is played."""
        return self._num_hits, self._stuck

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this deal."""
        assert isinstance(snapshot, tuple)
        self._num_hits, self._stuck = snapshot

    def close(self) -> None:
        """Nothing is held."""

    @property
    def _player(self) -> tuple[str, ...]:
        return self._deck[2 : 4 + self._num_hits]

    @property
    def _dealer(self) -> tuple[str, ...]:
        """The dealer's cards; drawn out once the player sticks."""
        hand, following = self._deck[:2], 4 + self._num_hits
        while self._stuck and total(hand) < 17:
            hand, following = (*hand, self._deck[following]), following + 1
        return hand

    def _observe(self, feedback: str, valid: bool | None, system: str = "") -> Observation:
        shown = self._dealer if self._stuck else (self._dealer[0], "?")
        dealer = f"{', '.join(shown)} ({total(shown)})" if self._stuck else shown[0]
        soft = ", an ace counts 11" if is_soft(self._player) else ""
        state = f"Dealer: {dealer}\nYou: {', '.join(self._player)} ({total(self._player)}{soft})"
        state = "" if self._scale else state
        actions = f"Actions: {', '.join(ACTIONS)}"
        return Observation(
            "\n".join(filter(None, [feedback, state, actions])),
            system,
            state=state,
            task=TASK,
            actions=ACTIONS,
            valid=valid,
            images=(self._draw(shown),) if self._scale else (),
        )

    def _draw(self, dealer: Sequence[str]) -> Image:
        hands = [draw_cards(hand, self._scale, 6) for hand in (dealer, self._player)]
        return stack(hands, GREEN, 4 * self._scale)


def is_soft(hand: Sequence[str]) -> bool:
    """Whether an ace of the hand counts 11."""
    return "A" in hand and sum(map(value, hand)) <= 11


def total(hand: Sequence[str]) -> int:
    """What the hand counts: an ace 11 where that does not go over 21, else 1."""
    return sum(map(value, hand)) + 10 * is_soft(hand)


def is_natural(hand: Sequence[str]) -> bool:
    """Whether two cards make 21."""
    return len(hand) == 2 and total(hand) == 21
