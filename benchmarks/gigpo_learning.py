"""Does the step level help? GiGPO against GRPO++ with GRPO's advantage, on TextWorld games of 6 to 8 commands.

Run (about 40 minutes on 2 cores): `python benchmarks/gigpo_learning.py [--seeds 0 1 2] [--root FOLDER]`.
The policy is a million weights, trained from nothing on the solutions of 1,500 training games (`small_policy.py`), so
that many iterations of several seeds fit a CPU. From there both methods share every setting: games, rollouts, learning
rate, clips, and per seed the prompts and the sampling noise. They were chosen once for both: with twice the learning
rate and four updates an iteration both collapsed within 9 iterations of one seed (GiGPO to 11 %, GRPO to 5 %).

The games pay 1 when they are won and nothing on the way. GiGPO compares steps by the environment's state, since most
texts of these games stand for several states (`benchmarks/gigpo_aliasing.py`); `--methods gigpo_text` adds the paper's
text anchor. Neither fines invalid actions, which GRPO could not tell apart. The held-out games are the same for all,
and are played as in training, at temperature 1. Two runs go side by side, with a thread each. What is finished is not
run again, and what was interrupted is resumed. Results are appended to `<root>/results.jsonl`; `--report` reads it and
writes the table and the curves beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

from gigpo_report import write_report
from small_policy import build

from lit_agentrl.envs import TextWorldSuite

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parent / "configs" / "experiment"
SHARED = {
    "lora": None,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "drop_zero_advantage": True,
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5.0e-4, "weight_decay": 0.0}},
}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"class_path": "GRPOPlusPlusModule", "init_args": SHARED | {"advantage": "grpo"}},
    "gigpo": {"class_path": "GiGPOModule", "init_args": SHARED | {"anchor": "state", "invalid_penalty": 0.0}},
    "gigpo_text": {"class_path": "GiGPOModule", "init_args": SHARED | {"anchor": "text", "invalid_penalty": 0.0}},
}
GAMES: dict[str, Any] = {"class_path": "TextWorldSuite", "init_args": {"level": "medium", "num_train": 3000}}
PHASES = ("collect", "advantages", "prepare", "update", "evaluate")
WRITING = Lock()


def main() -> None:
    """Run what is missing, two at a time, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["grpo", "gigpo"])
    parser.add_argument("--iterations", type=int, default=36)
    parser.add_argument("--tasks", type=int, default=100, help="held-out games")
    parser.add_argument("--every", type=int, default=9, help="iterations between evaluations")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--root", default="runs/bench_gigpo")
    parser.add_argument("--out", type=Path, default=HERE, help="where the report goes")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parsed = parser.parse_args()
    root = Path(parsed.root)
    if not parsed.report:
        start = warm_up(root)
        wanted = [(m, s) for s, m in product(parsed.seeds, parsed.methods) if (m, s) not in finished(root)]
        sizes = {
            "trainer.max_epochs": parsed.iterations,
            "evaluation.num_tasks": parsed.tasks,
            "evaluation.every_n_epochs": parsed.every,
            "data.environment": json.dumps(GAMES),
            "data.rollout.max_steps": 12,
            "data.num_prompts": 16,
            "evaluation.sampling.temperature": 1.0,
        }
        with ThreadPoolExecutor(parsed.jobs) as pool:
            list(pool.map(lambda pair: run(*pair, root, start, sizes), wanted))
    write_report(results(root), parsed.out)


def warm_up(root: Path) -> Path:
    """The folder of the policy that every run starts from."""
    folder = root / "warmup"
    if not (folder / "export" / "model.safetensors").exists():
        options: dict[str, object] = {
            "model.pretrained": build(root / "base", TextWorldSuite(**GAMES["init_args"])),
            "model.lora": "null",
            "model.optimizer.lr": 2e-3,
            "trainer.max_epochs": 11,
            "data.source.environment": json.dumps(GAMES),
            "data.source.num_tasks": 1500,
            "data.batch_size": 32,
            "data.max_tokens": 8192,
            "trainer.gradient_clip_val": 1.0,
        }
        command(folder, "gigpo_textworld_warmup", options)
    return folder / "export"


def run(method: str, seed: int, root: Path, start: Path, sizes: dict[str, object]) -> None:
    """Train one policy and append its result."""
    folder = root / f"{method}_seed{seed}"
    module = METHODS[method]
    module = module | {"init_args": module["init_args"] | {"pretrained": str(start)}}
    command(folder, "gigpo_textworld", sizes | {"model": json.dumps(module), "seed_everything": seed})
    with WRITING, (root / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(result(method, seed, folder)) + "\n")


def command(folder: Path, experiment: str, options: dict[str, object]) -> None:
    """`lit-agentrl fit`, resumed where it was interrupted; its output lies in `<folder>.log`."""
    given = options | {"trainer.default_root_dir": folder}
    if (folder / "checkpoints" / "last.ckpt").exists():
        given["ckpt_path"] = "last"
    words = [f"--{name}={value}" for name, value in given.items()]
    config = str(EXPERIMENTS / f"{experiment}.yaml")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.log").open("a") as log:
        print(f"{folder.name}: started, see {log.name}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "lit_agentrl", "fit", "--config", config, *words],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    print(f"{folder.name}: finished", flush=True)


def result(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Success after every evaluated iteration, which held-out games were won at the end, and seconds by phase."""
    evaluations = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    curve = {record["epoch"]: record["metrics"]["success"] for record in evaluations}
    last = folder / "transcripts" / f"eval_{max(curve):06d}.jsonl"
    games = [json.loads(line) for line in last.read_text().splitlines()]
    rows = [
        row
        for path in sorted(folder.glob("logs/version_*/metrics.csv"))
        for row in csv.DictReader(path.open())
        if row.get("time/iteration")
    ]
    return {
        "method": method,
        "seed": seed,
        "curve": sorted(curve.items()),
        "won": {game["prompt_id"]: bool(game["success"]) for game in games},
        "iterations": len(rows),
        "seconds": {phase: sum(float(row.get(f"time/{phase}") or 0) for row in rows) for phase in PHASES},
        "means": {
            name: sum(float(row[name]) for row in rows if row.get(name)) / len(rows)
            for name in ("zero_signal", "gigpo/zero_signal", "gigpo/lone_steps", "length/steps", "valid_actions")
            if rows[-1].get(name)
        },
    }


def results(root: Path) -> list[dict[str, Any]]:
    """All finished runs, the newest of each method and seed."""
    path = root / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(line["method"], line["seed"]): line for line in lines}.values())


def finished(root: Path) -> set[tuple[str, int]]:
    """Method and seed of the finished runs."""
    return {(line["method"], line["seed"]) for line in results(root)}


if __name__ == "__main__":
    main()
