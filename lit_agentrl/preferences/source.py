"""What miners need of the datamodule that plays for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from lit_agentrl.preferences.candidates import Candidate
from lit_agentrl.rollouts.base import Prompt
from lit_agentrl.rollouts.chat import ChatMode
from lit_agentrl.types import Environment, EnvironmentSuite, TrajectoryGroup


@runtime_checkable
class MiningSource(Protocol):
    """A datamodule that plays tasks with the policy as training does (`RolloutDataModule`)."""

    environment: EnvironmentSuite
    chat_mode: ChatMode
    seed: int
    group_size: int
    pretrained: str

    def play(
        self,
        prompts: Sequence[Prompt],
        group_size: int | None = None,
        wrap: Callable[[str, Environment], Environment] | None = None,
    ) -> list[TrajectoryGroup]:
        """Groups of some prompts; `wrap` makes of a task's environment what is played in its place."""
        ...


class Miner(ABC):
    """Finds pairs. A task's pairs depend on the task and the seed alone, whatever it is mined beside."""

    mode: ClassVar[str]
    """Its name in the provenance."""

    @abstractmethod
    def mine(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        """The pairs of each prompt, unfiltered."""

    def check(self, source: MiningSource) -> None:  # noqa: B027  # most have nothing to check
        """Refuse, before anything is played, a datamodule that this cannot mine.

        Raises:
            UserError: As it says.
        """

    def origin(self) -> dict[str, Any]:
        """What every pair's provenance holds beside its own: hashes of what the miner knows."""
        return {}
