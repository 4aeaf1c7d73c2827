"""The end of a pipeline: success by stage on the same held-out tasks, sample transcripts, and where the model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_agentrl.callbacks.evaluation import EvaluationRecord, read_evaluations
from lit_agentrl.callbacks.records import render_transcript, sample_records
from lit_agentrl.errors import UserError


def show(report: dict[str, Any], runs: dict[str, Path]) -> None:
    """Print the report that a pipeline file asks for.

    Args:
        report: `success`: rows of `{label, stage, which: first | last}`; `transcripts`: `{stage, num}`;
            `export`: the stage whose folder is the result.
        runs: The run folder of every stage.
    """
    console = Console()
    console.print(success_table([_row(entry, runs) for entry in report.get("success", [])]))
    wanted = report.get("transcripts")
    for record in _samples(runs[wanted["stage"]], int(wanted.get("num", 3))) if wanted else []:
        console.print(render_transcript(record))
    if report.get("export"):
        print(f"Hugging Face folder of the trained policy: {runs[report['export']] / 'export'}")  # print: never wrapped


def success_table(rows: list[tuple[str, EvaluationRecord]]) -> Table:
    """Success with its 95 % interval, reward and length, a row each evaluation."""
    table = Table(title="Success on held-out tasks")
    for column in ("policy", "success", "95 % interval", "mean reward", "steps", "tasks"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for label, record in rows:
        metrics = record["metrics"]
        interval = f"{_percent(metrics['success_low'])} - {_percent(metrics['success_high'])}"
        table.add_row(
            label,
            _percent(metrics["success"]),
            interval,
            f"{metrics['reward/mean'] or 0.0:.3f}",
            f"{metrics['length/steps'] or 0.0:.2f}",
            str(record["num_tasks"]),
        )
    return table


def _row(entry: dict[str, str], runs: dict[str, Path]) -> tuple[str, EvaluationRecord]:
    records = read_evaluations(runs[entry["stage"]])
    if not records:
        raise UserError(f"stage {entry['stage']!r} wrote no evaluation to {runs[entry['stage']]}/evaluation.jsonl.")
    return entry["label"], records[0 if entry.get("which", "last") == "first" else -1]


def _samples(run: Path, num: int) -> list[Any]:
    """Transcripts of the run's newest evaluation, from the lowest reward to the highest."""
    files = sorted((run / "transcripts").glob("eval_*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    return sample_records([json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()], num)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
