"""A table over stages: what each scored on the same held-out tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_agentrl.callbacks.evaluation import EvaluationRecord, read_evaluations
from lit_agentrl.errors import UserError
from lit_agentrl.report.intervals import Estimate
from lit_agentrl.report.page import Sheet
from lit_agentrl.report.spec import Column, Row, Table

ALIKE = ("split", "num_tasks", "group_size", "temperature")
"""What evaluations have to share for their rows to be compared."""


@dataclass(slots=True)
class PanelRow:
    """An evaluation, by the metrics that were asked for."""

    label: str
    stage: str
    record: EvaluationRecord
    values: dict[str, Estimate | None]
    """By the metrics' keys; None where the evaluation does not have one."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        facts = {key: self.record.get(key) for key in ("name", "when", "epoch", "step", *ALIKE)}
        values = {
            key: None if found is None else {"value": found.value, "low": found.low, "high": found.high}
            for key, found in self.values.items()
        }
        return {"label": self.label, "stage": self.stage, **facts, "values": values}


@dataclass(slots=True)
class Panel:
    """The table, before it becomes terminal, Markdown, HTML or JSON."""

    title: str
    columns: Sequence[Column]
    rows: list[PanelRow]
    notes: list[str]

    def sheet(self) -> Sheet:
        """As text."""
        rows = [
            [
                row.label,
                *(cell(row.values[column.key], column.is_percent) for column in self.columns),
                str(row.record["num_tasks"]),
            ]
            for row in self.rows
        ]
        return Sheet(self.title, ["stage", *(column.label for column in self.columns), "tasks"], rows, self.notes)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        columns = [{"key": c.key, "label": c.label, "percent": c.is_percent} for c in self.columns]
        rows = [row.as_dict() for row in self.rows]
        return {"title": self.title, "metrics": columns, "rows": rows, "notes": self.notes}


def make_panel(table: Table, runs: Mapping[str, Path]) -> Panel:
    """Read the evaluations of the stages.

    Args:
        table: Which metrics, and of which stages.
        runs: The run folder of every stage, in order.

    Raises:
        UserError: A stage was not evaluated, or no stage has one of the metrics.
    """
    wanted = table.rows
    if wanted is None:
        wanted = tuple(Row(name, name) for name, run in runs.items() if _records(run, table.name))
    if not wanted:
        raise UserError("report.table: no stage was evaluated, so there is nothing to show.")
    rows = []
    for row in wanted:
        record = pick(row, runs, table.name)
        values = {column.key: _value(record["metrics"], column.key) for column in table.columns}
        rows.append(PanelRow(row.label, row.stage, record, values))
    for column in table.columns:
        if not any(column.key in row.record["metrics"] for row in rows):
            has = sorted({key for row in rows for key in row.record["metrics"]})
            raise UserError(f"report.table: no stage has the metric {column.key!r}. They have {', '.join(has)}.")
    return Panel(table.title, table.columns, rows, _notes(rows, runs))


def pick(row: Row, runs: Mapping[str, Path], name: str | None = None) -> EvaluationRecord:
    """The evaluation that a row asks for.

    Raises:
        UserError: There is none.
    """
    records = _records(runs[row.stage], name)
    if not records:
        of_name = "" if name is None else f" of the name {name!r}"
        raise UserError(f"stage {row.stage!r} wrote no evaluation{of_name} to {runs[row.stage]}/evaluation.jsonl.")
    return records[0 if row.which == "first" else -1]


def cell(found: Estimate | None, is_percent: bool, *, is_difference: bool = False) -> str:
    """A value and its interval; differences have a sign, those of shares are in points."""
    if found is None:
        return "-"
    scale, form, unit = (100, ".1f", " points" if is_difference else " %") if is_percent else (1, ".4g", "")
    form = f"+{form}" if is_difference else form
    text = f"{format(scale * found.value, form)}{unit}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{format(scale * found.low, form)}, {format(scale * found.high, form)}]"


def _records(run: Path, name: str | None) -> list[EvaluationRecord]:
    return [record for record in read_evaluations(run) if name is None or record["name"] == name]


def _value(metrics: Mapping[str, float | None], key: str) -> Estimate | None:
    value = metrics.get(key)
    return None if value is None else Estimate(value, metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))


def _notes(rows: Sequence[PanelRow], runs: Mapping[str, Path]) -> list[str]:
    notes = []
    for key in ALIKE:
        found = {row.label: row.record.get(key) for row in rows}
        if len(set(map(repr, found.values()))) > 1:
            each = ", ".join(f"{label} {value}" for label, value in found.items())
            notes.append(f"Not evaluated alike, so that rows cannot be compared: {key} is {each}.")
    tasks = {row.label: _tasks(runs[row.stage], row.record) for row in rows}
    known = {label: ids for label, ids in tasks.items() if ids}
    if not notes and len(set(map(frozenset, known.values()))) > 1:
        notes.append(f"{', '.join(known)} were not evaluated on the same tasks: their transcripts name different ones.")
    return notes


def _tasks(run: Path, record: EvaluationRecord) -> Iterable[str]:
    """The ids of an evaluation's tasks; none where its transcripts are gone."""
    label = record["when"] if record["when"] in ("test", "validate") else f"{record['epoch']:06d}"
    path = run / "transcripts" / f"{record['name']}_{label}.jsonl"
    if not path.is_file():
        return ()
    return {str(json.loads(line)["prompt_id"]) for line in path.read_text(encoding="utf-8").splitlines()}
