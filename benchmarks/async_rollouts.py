"""How much wall time do rollouts save that are collected while the policy trains, and does it learn as well?

Run (about 4 minutes on 2 cores): `python benchmarks/async_rollouts.py [--seeds 0 1] [--latency 0.5]`. A policy of a
million weights learns to say words whose letters count, in an environment that takes its time for every step; each seed
runs with `staleness` 0 and 1 in turn, with the same engine. The table lies in `benchmarks/async_rollouts.md`.

The most that can be saved is the shorter of the two phases: at best the ratio is max(R, U) / (R + U), where R are the
seconds that the rollouts of an iteration take and U those of the update.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("LIT_AGENTRL_CACHE", tempfile.gettempdir())

from small_policy import build  # noqa: E402

from lit_agentrl.cli import main as lit_agentrl  # noqa: E402
from lit_agentrl.envs import EchoSuite  # noqa: E402
from lit_agentrl.envs.toy import EchoEnvironment  # noqa: E402
from lit_agentrl.types import Observation  # noqa: E402

ECHO = HERE.parent / "configs" / "experiment" / "grpopp_echo.yaml"
NUM_ITERATIONS = 12


class SleepyEnvironment(EchoEnvironment):
    """The echo task, with latency before every answer.

    Args:
        word: The word to say.
        latency: Seconds that a step takes.
    """

    def __init__(self, word: str, latency: float) -> None:
        super().__init__(word)
        self.latency = latency

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """As in the toy, later."""
        time.sleep(self.latency)
        return super().step(action)


class SleepySuite(EchoSuite):
    """Words to say to an environment that takes its time.

    Args:
        latency: Seconds that a step takes.
    """

    def __init__(self, latency: float = 0.5) -> None:
        self.latency = latency

    def make(self, task: str) -> EchoEnvironment:
        """An episode about one word."""
        return SleepyEnvironment(task, self.latency)


def main() -> None:
    """Run both sides, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--latency", type=float, default=0.5)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lm = build(Path(folder) / "lm", EchoSuite())
        runs = {
            (staleness, seed): run(lm, Path(folder) / f"{staleness}-{seed}", staleness, seed, parsed.latency)
            for seed in parsed.seeds
            for staleness in (0, 1)
        }
    text = table(runs, parsed.latency)
    print(text)
    (HERE / "async_rollouts.md").write_text(text)


def run(lm: Path, folder: Path, staleness: int, seed: int, latency: float) -> list[dict[str, float]]:
    """The logged numbers of every iteration."""
    chosen = {
        "trainer.max_epochs": NUM_ITERATIONS,
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "seed_everything": seed,
        "model.pretrained": lm,
        "model.lora": "null",
        "model.optimizer.lr": 1e-3,
        "data.environment": json.dumps({"class_path": "async_rollouts.SleepySuite", "init_args": {"latency": latency}}),
        "data.engine": '{"class_path": "HFEngine", "init_args": {"own_weights": true}}',
        "data.staleness": staleness,
        "data.num_prompts": 8,
        "data.group_size": 8,
        "data.num_passes": 3,
        "data.num_workers": 16,
        "evaluation.at_start": "false",
        "evaluation.at_end": "false",
        "transcripts.show": 0,
    }
    lit_agentrl(["fit", "--config", str(ECHO), *(str(w) for k, v in chosen.items() for w in (f"--{k}", v))])
    rows = list(csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").open()))
    return [{k: float(v) for k, v in row.items() if v} for row in rows if row.get("reward/mean")]


def table(runs: dict[tuple[int, int], list[dict[str, float]]], latency: float) -> str:
    """Seconds of both sides and their ratio, and what was learnt."""
    lines = [
        "| seed | staleness | s per iteration | of these rollouts (R) | update (U) | ratio | best possible "
        "| reward: first | last 3 | largest mismatch KL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed in sorted({seed for _, seed in runs}):
        sides = {staleness: parts(runs[staleness, seed]) for staleness in (0, 1)}
        total, rollouts, update = sides[0]["total"], sides[0]["rollouts"], sides[0]["update"]
        for staleness, side in sides.items():
            ratio, best = side["total"] / total, max(rollouts, update) / (rollouts + update)
            lines.append(
                f"| {seed} | {staleness} | {side['total']:.2f} | {side['rollouts']:.2f} | {side['update']:.2f} | "
                f"{ratio:.2f} | {best if staleness else 1:.2f} | {side['first']:.3f} | {side['last']:.3f} | "
                f"{side['kl']:.4f} |"
            )
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"
    head = (
        f"`python benchmarks/async_rollouts.py --latency {latency:g}`: {NUM_ITERATIONS} iterations of 8 x 8 episodes "
        f"of 2 steps, 3 passes, {latency:g} s a step over 16 threads. Medians without the first iteration: nothing "
        f"can be collected before it. {machine}.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def parts(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians of seconds over the iterations after the first, and rewards."""
    later = rows[1:]
    seconds = [b["budget/total_seconds"] - a["budget/total_seconds"] for a, b in zip(rows, later, strict=False)]
    return {
        "total": statistics.median(seconds),
        "rollouts": statistics.median(row["time/rollouts"] for row in later),
        "update": statistics.median(row["time/update"] for row in later),
        "first": rows[0]["reward/mean"],
        "last": statistics.mean(row["reward/mean"] for row in rows[-3:]),
        "kl": max(row.get("mismatch/kl_k3", 0.0) for row in rows),
    }


if __name__ == "__main__":
    main()
