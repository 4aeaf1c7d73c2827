"""Runs of the real command line on the tiny model, in this process or in one of their own."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_agentrl.cli import main
from lit_agentrl.envs import EchoSuite
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.types import Environment, Trajectory, TrajectoryGroup

ROOT = Path(__file__).parent.parent
ECHO = str(ROOT / "configs" / "experiment" / "grpopp_echo.yaml")


def mean_token(trajectory: Trajectory) -> float:
    """A reward that a random model earns differently every time: the mean id of the tokens it sampled."""
    ids = [i for step in trajectory.steps for i in step.action_ids]
    return sum(ids) / (300 * max(1, len(ids)))


class SlowSuite(EchoSuite):
    """The echo task with a tenth of a second in front of every episode: time to be killed in."""

    def make(self, task: str) -> Environment:
        time.sleep(0.1)
        return super().make(task)


class CountedChain(ChainRollout):
    """Chains of an environment without tools, where every action counts as a call."""

    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        groups = super().collect(prompts, group_size, context)
        for trajectory in (t for group in groups for t in group.trajectories):
            trajectory.cost.generated_tokens = sum(len(step.action_ids) for step in trajectory.steps)
            trajectory.cost.tool_calls = len(trajectory.steps)
        return groups


COUNTED = ("--data.rollout", '{"class_path": "runs.CountedChain", "init_args": {"max_steps": 2}}')


def options(lm: str, run: Path, *more: str) -> list[str]:
    """`fit` on the echo task with the tiny model: two iterations of 2 prompts x 4 trajectories."""
    small = {
        "trainer.max_epochs": "2",
        "trainer.default_root_dir": str(run),
        "trainer.accelerator": "cpu",
        "model.pretrained": lm,
        "model.optimizer.lr": "1e-2",
        "data.num_prompts": "2",
        "evaluation.num_tasks": "2",
        "data.rewards": '[{"function": "runs.mean_token"}]',
        "transcripts.show": "0",
    }
    return ["fit", "--config", ECHO, *(w for k, v in small.items() for w in (f"--{k}", v)), *more]


def fit(lm: str, run: Path, *more: str) -> dict[str, Any]:
    """Fit in this process; gives the last checkpoint."""
    main(options(lm, run, *more))
    return checkpoint(run)


def checkpoint(run: Path) -> dict[str, Any]:
    """The run's last checkpoint, loaded as data only."""
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def start(arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "lit_agentrl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")} | environment,
    )


def run_alone(arguments: list[str], **environment: str) -> tuple[int, str]:
    """Exit code and output of a process of its own."""
    process = start(arguments, **environment)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of the run's newest CSV log."""
    newest = max(run.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    return list(csv.DictReader(newest.open()))
