"""Hard caps on what the rollouts of a prompt may cost: an action is only begun where its worst case still fits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_agentrl.errors import UserError
from lit_agentrl.types import Ledger

if TYPE_CHECKING:
    from lit_agentrl.rollouts.episode import Episode


@dataclass(frozen=True)
class Budget:
    """What all trajectories of one prompt may cost together; None is no limit.

    An episode whose next action might go beyond ends with `StopReason.BUDGET`; one that could not begin is left out and
    counted (`budget/not_begun`).

    Args:
        generated_tokens: Sampled tokens. An action is counted with `max_new_tokens` until it is there.
        tool_calls: Calls of tools (`metrics["tool_calls"]` of the environment). An action is counted as one call until
            the environment has carried it out, so an environment that makes several at once can go beyond by those.
        seconds: Wall clock from the start of the collection, for all its prompts. It is looked at between actions.

    Raises:
        UserError: A cap is not positive.
    """

    generated_tokens: int | None = None
    tool_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse caps under which nothing could be played."""
        for name in ("generated_tokens", "tool_calls", "seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"budget.{name}={value}: must be above 0, or null for no limit.")

    def check_action(self, max_new_tokens: int) -> None:
        """Refuse a budget in which not even one action fits.

        Raises:
            UserError: It is below `max_new_tokens`.
        """
        if self.generated_tokens is not None and self.generated_tokens < max_new_tokens:
            raise UserError(
                f"budget.generated_tokens={self.generated_tokens} is below sampling.max_new_tokens={max_new_tokens}: "
                "not one action would fit. Raise --data.budget.generated_tokens, or lower "
                "--data.sampling.max_new_tokens."
            )


class Accounts:
    """What the prompts of a collection have spent, and who may still act.

    Args:
        budget: The cap of each prompt; None lets everybody act.
        max_new_tokens: Worst case of an action.
    """

    def __init__(self, budget: Budget | None, max_new_tokens: int) -> None:
        self.budget, self.max_new_tokens = budget, max_new_tokens
        self._episodes: dict[int, list[Episode]] = {}
        self._began = time.perf_counter()

    def open(self, episodes: Sequence[Episode]) -> None:
        """Let `episodes` spend from their prompts' accounts."""
        for episode in episodes:
            self._episodes.setdefault(episode.prompt.number, []).append(episode)

    def spent(self, prompt: int) -> Ledger:
        """What the prompt of this number has cost so far."""
        return sum((episode.trajectory.cost for episode in self._episodes.get(prompt, [])), Ledger())

    def admit(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Those of `episodes` that may act now: in their order, as long as the worst case of all admitted ones fits."""
        if self.budget is None:
            return list(episodes)
        if self.budget.seconds is not None and time.perf_counter() - self._began >= self.budget.seconds:
            return []
        places: dict[int, int] = {}
        admitted = []
        for episode in episodes:
            number = episode.prompt.number
            if number not in places:
                places[number] = self._places(number)
            if places[number] > 0:
                places[number] -= 1
                admitted.append(episode)
        return admitted

    def _places(self, number: int) -> int:
        """Actions that the rest of a prompt's budget is enough for, however they turn out."""
        assert self.budget is not None
        spent = self.spent(number)
        places = [len(self._episodes.get(number, []))]
        if self.budget.generated_tokens is not None:
            places.append((self.budget.generated_tokens - spent.generated_tokens) // self.max_new_tokens)
        if self.budget.tool_calls is not None:
            places.append(self.budget.tool_calls - spent.tool_calls)
        return min(places)
