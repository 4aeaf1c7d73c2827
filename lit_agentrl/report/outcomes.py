"""What a finished run says of itself: its evaluations with what they had cost, task by task where that is known."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lit_agentrl.callbacks.evaluation import EvaluationRecord, read_evaluations
from lit_agentrl.errors import UserError


@dataclass(slots=True)
class RunOutcome:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    budgets: list[dict[str, float]]
    """What the run had cost at each of its N evaluations."""
    metrics: list[float]
    """[N], as recorded."""
    tasks: list[dict[str, float]] | None
    """The same task by task, by the ids of the tasks; None where transcripts do not give it."""
    num_tasks: int
    iterations: int
    """Of the last evaluation."""
    config: dict[str, Any]
    """The options by their dotted names."""


def read_run(arm: str, seed: int, folder: Path, metric: str) -> RunOutcome:
    """The evaluations of a run, one for each amount that was spent.

    Raises:
        UserError: They are too few, say nothing of budgets, or do not have the metric.
    """
    config = _config(folder / "config.yaml")
    name = str(config.get("evaluation.name", "eval"))
    records: dict[tuple[float, float], EvaluationRecord] = {}
    for record in read_evaluations(folder):
        budget = record.get("budget")
        if record["name"] != name or record["when"] in ("test", "validate"):
            continue
        if not budget:
            raise UserError(f"{folder}/evaluation.jsonl does not say what was spent: its datamodule keeps no ledger.")
        _check(metric, record, folder)
        records[budget["generated_tokens"], budget["seconds"]] = record  # of a repeated one, the last
    ordered = sorted(records.values(), key=lambda record: (record["epoch"], record["step"]))
    if len(ordered) < 2:
        raise UserError(f"{folder}/evaluation.jsonl has {len(ordered)} evaluations of {name!r}; a curve needs 2.")
    return RunOutcome(
        arm,
        seed,
        folder,
        [record["budget"] for record in ordered],
        [float(record["metrics"][metric] or 0.0) for record in ordered],
        _tasks(ordered, folder, metric),
        ordered[-1]["num_tasks"],
        ordered[-1]["epoch"],
        config,
    )


def _check(metric: str, record: EvaluationRecord, folder: Path) -> None:
    metrics = record["metrics"]
    if metric not in metrics:
        raise UserError(f"metric {metric!r} is not in {folder}/evaluation.jsonl. It has {', '.join(sorted(metrics))}.")
    if metrics[metric] is None:
        raise UserError(f"metric {metric!r} has no value in {folder}/evaluation.jsonl at iteration {record['epoch']}.")


def _tasks(records: list[EvaluationRecord], folder: Path, metric: str) -> list[dict[str, float]] | None:
    """The metric by task at every evaluation; None unless its mean is what was recorded (`pass_at_k` is no mean)."""
    value = _value(metric)
    if value is None:
        return None
    found = []
    for record in records:
        path = folder / "transcripts" / f"{record['name']}_{record['epoch']:06d}.jsonl"
        tasks = _task_means(path, value) if path.is_file() else {}
        recorded = record["metrics"][metric]
        if not tasks or recorded is None or abs(np.mean(list(tasks.values())) - recorded) > 1e-9:
            return None
        found.append(tasks)
    return found if all(tasks.keys() == found[0].keys() for tasks in found) else None


def _task_means(path: Path, value: Callable[[dict[str, Any]], float | None]) -> dict[str, float]:
    episodes: dict[str, list[float]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        trajectory = json.loads(line)
        number = value(trajectory)
        if number is not None and trajectory["stop_reason"] not in ("env_error", "env_timeout"):
            episodes[trajectory["prompt_id"]].append(float(number))
    return {task: float(np.mean(numbers)) for task, numbers in episodes.items()}


def _value(metric: str) -> Callable[[dict[str, Any]], float | None] | None:
    """How an episode of the transcripts gives a metric that is a mean over tasks."""
    kind, _, name = metric.partition("/")
    if metric == "success" or kind.startswith("avg_at_"):
        return lambda trajectory: trajectory["success"]
    if metric == "reward/mean":
        return lambda trajectory: trajectory["total_reward"]
    if kind == "reward":
        return lambda trajectory: trajectory["rewards"].get(name)
    if kind == "environment":
        return lambda trajectory: trajectory["metrics"].get(name)
    return None


def task_values(runs: list[RunOutcome]) -> list[NDArray[np.float64]]:
    """The metric of every run [N, T] on the tasks that all runs share; [N, 1] where they share none or not all."""
    ids = [set(run.tasks[0]) if run.tasks else set() for run in runs]
    if not ids[0] or any(other != ids[0] for other in ids):
        return [np.array(run.metrics)[:, None] for run in runs]
    order = sorted(ids[0])
    return [np.array([[tasks[task] for task in order] for tasks in run.tasks or []]) for run in runs]


def _config(path: Path) -> dict[str, Any]:
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, without `init_args`, which is written and never meant."""
    if isinstance(tree, dict) and tree:
        return {
            name: value
            for key, child in tree.items()
            for name, value in flatten(child, prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")).items()
        }
    return {prefix: tree}
