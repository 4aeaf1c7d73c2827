"""What every rollout strategy is given, and what it must return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.rollouts.budget import Budget
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.memory import Memory
from lit_agentrl.types import Engine, Environment, SamplingParams, TrajectoryGroup


@dataclass(slots=True, frozen=True)
class Prompt:
    """A task to roll out: its id, and its running number, which keys the randomness of its trajectories."""

    task: str
    number: int


@dataclass(slots=True, frozen=True)
class RolloutContext:
    """The parts a rollout plays with, and the numbers that key its randomness."""

    engine: Engine
    chat: Chat
    pool: EnvironmentPool
    make: Callable[[str], Environment]
    """Starts a fresh environment for a task."""
    sampling: SamplingParams
    max_length: int
    """Tokens an episode may hold, prompt and answers together."""
    seed: int = 0
    iteration: int = 0
    budget: Budget | None = None
    """What the trajectories of a prompt may cost together."""
    memory: Memory | None = None
    """Writes the prompt of every step, where prompts are rebuilt; None shows the observation alone."""

    @property
    def room(self) -> int:
        """Tokens that a prompt may have beside an action."""
        return self.max_length - self.sampling.max_new_tokens


class RolloutStrategy(ABC):
    """How trajectories are gathered for prompts: side by side (`ChainRollout`), or as trees (`TreeRollout`)."""

    def group_size(self, asked: int | None) -> int:
        """Trajectories of a prompt, where `asked` is what the user wants (None: whatever the strategy gives)."""
        return 8 if asked is None else asked

    def evaluation(self) -> RolloutStrategy:
        """The strategy that held-out tasks are played with: independent episodes."""
        return self

    @abstractmethod
    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        """One group per prompt, in the order of `prompts`."""
