"""What many environments side by side add to a rollout: seconds inside them and their pool against seconds generating.

    python benchmarks/environments.py [--episodes 64] [--steps 8] [--repeats 3] [--threads 2]

One real policy (SmolLM2-135M-Instruct), one prompt per group of 8, each suite in threads and in worker processes. The
pool's clock runs from handing over a turn's calls until the last is answered, so scheduling counts as environment.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_agentrl.envs import SokobanSuite, TextWorldSuite
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.envs.process import ProcessHost
from lit_agentrl.models.policy import load_policy, load_tokenizer
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import EnvironmentSuite, SamplingParams

MODEL = "smollm2-135m-instruct"
GROUP = 8
NUM_WORKERS = 8
COLUMNS = ("environments", "in", "calls", "rollout s", "environments s", "of the rest %", "ms a call")


class TimedPool(EnvironmentPool):
    """Adds up the seconds in which a rollout waits for its environments."""

    seconds = 0.0
    num_calls = 0

    def call(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """As it is, with the clock running."""
        began = time.perf_counter()
        answers = super().call(calls)
        self.seconds += time.perf_counter() - began
        self.num_calls += len(calls)
        return answers


def roll(suite: EnvironmentSuite, workers: str, args: argparse.Namespace, engine: HFEngine, seed: int) -> list[float]:
    """Seconds of one rollout, seconds waiting for environments, and their calls."""
    host = ProcessHost(suite, NUM_WORKERS, 60.0) if workers == "processes" else None
    if host:
        for task in suite.tasks("train")[:NUM_WORKERS]:  # starting the workers is paid once a run, not once a rollout
            host.make(task).reset()
    pool = TimedPool(NUM_WORKERS, None if host else 60.0)
    context = RolloutContext(
        engine,
        Chat(load_tokenizer(MODEL), "rebuild"),
        pool,
        host.make if host else suite.make,
        SamplingParams(max_new_tokens=args.new),
        1024,
        seed,
    )
    prompts = [Prompt(task, i) for i, task in enumerate(suite.tasks("train")[: args.episodes // GROUP])]
    began = time.perf_counter()
    ChainRollout(max_steps=args.steps, cut_actions="continue").collect(prompts, GROUP, context)
    seconds = time.perf_counter() - began
    if host:
        host.close()
    return [seconds, pool.seconds, pool.num_calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"episodes": 64, "steps": 8, "repeats": 3, "threads": 2, "new": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = HFEngine()
    engine.sync(load_policy(MODEL))
    suites = {
        "TextWorld, easy": TextWorldSuite(restate=True),
        "TextWorld, medium": TextWorldSuite(level="medium", restate=True),
        "Sokoban 6x6": SokobanSuite(),
    }
    lines = []
    for name, suite in suites.items():
        for workers in ("threads", "processes"):
            runs = [roll(suite, workers, args, engine, seed) for seed in range(args.repeats)]
            rollout, waiting, calls = (statistics.median(column) for column in zip(*runs, strict=True))
            share = statistics.median(100 * inside / (whole - inside) for whole, inside, _ in runs)
            cells = (name, workers, f"{calls:.0f}", f"{rollout:.2f}", f"{waiting:.3f}", f"{share:.2f}")
            lines.append(f"| {' | '.join((*cells, f'{1000 * waiting / calls:.2f}'))} |")
            print(lines[-1], flush=True)
    write(lines, args)


def write(lines: list[str], args: argparse.Namespace) -> None:
    """The table beside the script."""
    command = f"python benchmarks/environments.py --repeats {args.repeats} --threads {args.threads}"
    text = [
        "# What environments add to a rollout\n",
        f"`{command}`: {args.episodes} episodes side by side, up to {args.steps} steps of at most {args.new} tokens, "
        f"{MODEL} on {args.threads} threads, {NUM_WORKERS} workers; medians of {args.repeats}. A call is making and "
        "resetting an environment, a step, or closing it; waiting for the pool counts as environment.\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *lines,
        f"\ntorch {torch.__version__}.",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
