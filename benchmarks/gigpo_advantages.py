"""How long do GiGPO's advantages take? ALFWorld's batch, 3,840 steps: maths alone, with the states, with similarity.

Run (seconds): `python benchmarks/gigpo_advantages.py`. 16 groups x 8 episodes x 30 steps over 55 made-up observations
of some 80 characters. Each number is the fastest of 20 repetitions: what the code needs on a machine of its own.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable

import torch

from lit_agentrl.advantages import gigpo_advantages
from lit_agentrl.anchors import group_similar, numbered
from lit_agentrl.methods import GiGPOModule
from lit_agentrl.types import Step, Trajectory, TrajectoryGroup

GROUPS, EPISODES, STEPS, STATES = 16, 8, 30, 55


def main() -> None:
    """Print the table."""
    rng = random.Random(0)
    texts = [
        " ".join(rng.choice(["shelf", "mug", "lamp", "desk", "you", "see", "a", "on", "the"]) for _ in range(20))
        for _ in range(STATES)
    ]
    groups = [made_group(rng, texts) for _ in range(GROUPS)]
    flat = [step.state for group in groups for trajectory in group.trajectories for step in trajectory.steps]
    row = torch.arange(len(flat))
    rewards = torch.rand(len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    owners, plays, times = row // (EPISODES * STEPS), row // STEPS, row % STEPS
    anchors = torch.tensor(numbered(flat))
    module = GiGPOModule(pretrained="not loaded")
    cases: dict[str, Callable[[], object]] = {
        "gigpo_advantages (tensors)": lambda: gigpo_advantages(rewards, rewards, owners, plays, times, anchors),
        "GiGPOModule.batch_advantages (trajectories, statistics)": lambda: module.batch_advantages(groups),
        "group_similar at 0.95": lambda: group_similar(flat, owners.tolist(), 0.95),
    }
    print(f"{len(flat):,} steps, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| what | ms |\n|---|---|")
    for name, case in cases.items():
        print(f"| {name} | {1000 * fastest(case):.1f} |", flush=True)


def made_group(rng: random.Random, texts: list[str]) -> TrajectoryGroup:
    """Episodes that wander between observations; half of them pay 10 at the end."""
    trajectories = []
    for _ in range(EPISODES):
        steps = [
            Step([1], [2], [0.0], state=rng.choice(texts), action="go", valid=rng.random() > 0.1) for _ in range(STEPS)
        ]
        steps[-1].reward = rng.choice([0.0, 10.0])
        trajectories.append(Trajectory(steps, total_reward=steps[-1].reward))
    return TrajectoryGroup("task", trajectories)


def fastest(case: Callable[[], object], repetitions: int = 20) -> float:
    """Seconds of the fastest run."""
    best = float("inf")
    for _ in range(repetitions):
        began = time.perf_counter()
        case()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
