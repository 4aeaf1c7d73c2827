"""Does the quickstart learn? Its whole chain for several seeds: untrained, warm-started and trained success, and time.

Run (about 10 minutes a seed on 2 cores): `python benchmarks/quickstart_learning.py [--seeds 0 1 2] [--root FOLDER]`.
Every seed draws its own warm-up order, adapter, prompts and samples; the held-out tasks are the same for all, decoding
is greedy before and after. Finished seeds are not run again, so an interrupted benchmark continues. The table lies in
`benchmarks/quickstart_learning.md`.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
PIPELINE = HERE.parent / "configs" / "pipeline" / "quickstart.yaml"


def main() -> None:
    """Run the seeds, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="runs/bench_quickstart")
    parsed = parser.parse_args()
    rows = [run(seed, Path(parsed.root) / f"seed{seed}") for seed in parsed.seeds]
    text = table(rows)
    print(text)
    (HERE / "quickstart_learning.md").write_text(text)


def run(seed: int, root: Path) -> dict[str, float]:
    """One seed's numbers."""
    seconds = root / "seconds.json"
    if not seconds.exists():
        began = time.perf_counter()
        words = [sys.executable, "-m", "lit_agentrl", "pipeline", str(PIPELINE), f"root={root}", f"seed={seed}"]
        subprocess.run(words, check=True)
        seconds.write_text(json.dumps(time.perf_counter() - began))
    untrained, start, end = evaluations(root / "untrained")[-1], *ends(root / "train")
    return {
        "seed": seed,
        "untrained": untrained["metrics"]["success"],
        "warm-started": start["metrics"]["success"],
        "trained": end["metrics"]["success"],
        "tasks": end["num_tasks"],
        "rl_minutes": training_seconds(root / "train") / 60,
        "whole_minutes": json.loads(seconds.read_text()) / 60,
    }


def evaluations(run_folder: Path) -> list[dict[str, dict[str, float]]]:
    """All evaluations of a run, oldest first."""
    return [json.loads(line) for line in (run_folder / "evaluation.jsonl").read_text().splitlines()]


def ends(run_folder: Path) -> tuple[dict, dict]:
    """The first and the last evaluation of a run."""
    every = evaluations(run_folder)
    return every[0], every[-1]


def training_seconds(run_folder: Path) -> float:
    """Seconds of all iterations (collect and update), without evaluation."""
    total = 0.0
    for path in run_folder.glob("logs/version_*/metrics.csv"):
        rows = [row for row in csv.DictReader(path.open()) if row.get("time/iteration")]
        total += sum(float(row["time/iteration"]) - float(row["time/evaluate"]) for row in rows)
    return total


def table(rows: list[dict[str, float]]) -> str:
    """The results as Markdown, with the machine and the versions."""
    lines = [
        "# Learning of the quickstart",
        "",
        "`python benchmarks/quickstart_learning.py`. Success on held-out TextWorld tasks, greedy decoding, no hints;",
        "RL minutes are collection and update, the whole includes loading, warm-up and evaluation.",
        "",
        "| seed | untrained | warm-started | trained | lift over warm start | RL minutes | whole minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [line(str(row["seed"]), row) for row in rows]
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    lift = statistics.median(row["trained"] - row["warm-started"] for row in rows)
    lines.append(line("median", median, lift))
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "lightning", "peft", "textworld")
    )
    lines += ["", f"{int(rows[0]['tasks'])} tasks. {machine()}. Python {platform.python_version()}, {versions}.", ""]
    return "\n".join(lines)


def line(label: str, row: dict[str, float], lift: float | None = None) -> str:
    """One row of the table."""
    gain = row["trained"] - row["warm-started"] if lift is None else lift
    shares = " | ".join(f"{100 * row[key]:.1f} %" for key in ("untrained", "warm-started", "trained"))
    return f"| {label} | {shares} | {100 * gain:+.1f} points | {row['rl_minutes']:.1f} | {row['whole_minutes']:.1f} |"


def machine() -> str:
    """Processor and threads."""
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
