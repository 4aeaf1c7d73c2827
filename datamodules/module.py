"""What the rollout datamodule needs of the module that it collects for: the seam, so that neither imports the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lit_agentrl.models.scoring import PaddedModel
from lit_agentrl.types import Advantages, Credit, TrainBatch, Trajectory, TrajectoryGroup


class RolloutModule(Protocol):
    """What the datamodule needs of the module it collects for."""

    policy: PaddedModel | None
    group_relative: bool
    credit: Credit
    old_logprobs: str
    advantage_sums: dict[str, tuple[float, float]]

    @property
    def shares_prefixes(self) -> bool:
        """Whether micro-batches are planned by unique tokens."""
        ...

    def advantages(self, group: TrajectoryGroup) -> Advantages:
        """The advantages of one group."""
        ...

    def batch_advantages(self, groups: Sequence[TrajectoryGroup]) -> list[Advantages]:
        """The advantages of every group."""
        ...

    def trains_on(self, trajectory: Trajectory, advantages: list[float]) -> bool:
        """Whether a trajectory enters the loss."""
        ...

    def logprobs_of(self, batch: TrainBatch) -> Tensor:
        """The trainer's own log-probabilities [B, L] of a batch on the CPU, as it computes them; no gradients."""
        ...

    def prepare(self, batches: Sequence[TrainBatch]) -> None:
        """Score the iteration's batches before its first update."""
        ...
