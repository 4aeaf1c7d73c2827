"""What goes wrong on the second rank alone, while the first one is well."""

from __future__ import annotations

from lit_agentrl import distributed
from lit_agentrl.envs import EchoSuite
from lit_agentrl.types import Environment, Observation, Trajectory


class BrokenSuite(EchoSuite):
    """No episode of the second rank begins."""

    def make(self, task: str) -> Environment:
        environment = super().make(task)
        if distributed.world()[0] == 1:
            environment.reset = broken  # type: ignore[method-assign]
        return environment


def broken() -> Observation:
    raise ConnectionError("the simulator is gone")


def reward(trajectory: Trajectory) -> float:
    """Defined on the first rank only."""
    return 1 / (1 - distributed.world()[0])
