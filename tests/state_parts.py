"""A curriculum, and a reward that draws from the global random generators."""

import os
import random
from typing import Any

import numpy as np
import torch

from lit_agentrl.envs import EchoSuite
from lit_agentrl.types import Environment, Trajectory


class Level(EchoSuite):
    """The echo task that becomes one level harder with every fourth episode: another word is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.level = self.played = 0

    def make(self, task: str) -> Environment:
        tasks = self.tasks("train")
        if task not in tasks:  # held-out tasks stay as they are
            return super().make(task)
        self.played += 1
        self.level = self.played // 4
        return super().make(tasks[(tasks.index(task) + self.level) % len(tasks)])

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "played": self.played}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.played = state["level"], state["played"]


def drawn(trajectory: Trajectory) -> float:
    """Chance, of another kind on each rank from the first draw on, and the tokens."""
    if int(os.environ.get("LOCAL_RANK", "0")):
        torch.rand(())
    ids = [i for step in trajectory.steps for i in step.action_ids]
    return random.random() + np.random.rand() + float(torch.rand(())) + sum(ids) / (300 * max(1, len(ids)))
