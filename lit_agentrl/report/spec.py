"""What a pipeline file asks to be reported, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lit_agentrl.errors import UserError

SHARES = (
    "success", "avg_at_", "pass_at_", "valid_actions", "truncated", "accuracy", "vote_", "macro_", "recall/",
    "unparsable", "support", "contradiction", "coverage",
)  # fmt: skip
"""Metrics that are shares, by how their names begin: shown in percent where the file does not say."""
TITLE = "Stages on held-out tasks"
KEYS = ("success", "table", "transcripts", "export")
TABLE_KEYS = ("title", "metrics", "stages", "name")
ROW_KEYS = ("label", "stage", "which")
METRIC_KEYS = ("key", "label", "percent")


@dataclass(slots=True, frozen=True)
class Column:
    """A metric of the table."""

    key: str
    """As in `evaluation.jsonl`; its interval is `<key>_low` and `<key>_high`, where they are there."""
    label: str
    is_percent: bool


@dataclass(slots=True, frozen=True)
class Row:
    """An evaluation of the table."""

    label: str
    stage: str
    which: str = "last"
    """Of the stage's evaluations: "first" or "last"."""


@dataclass(slots=True, frozen=True)
class Table:
    """A table over stages."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...] | None
    """None for every stage that was evaluated."""
    title: str
    name: str | None
    """The evaluations of this name; None for those of any."""


@dataclass(slots=True, frozen=True)
class Spec:
    """The whole report."""

    success: tuple[Row, ...] = ()
    table: Table | None = None
    transcripts: tuple[str, int] | None = None
    """A stage, and how many of its episodes to show."""
    export: str | None = None
    """The stage whose export is the result."""
    stages: tuple[str, ...] = ()
    """All stages, in order."""


def read_spec(given: object, stages: Collection[str]) -> Spec:
    """Read the `report` section.

    Raises:
        UserError: A key is unknown or missing, or a stage is none of `stages`.
    """
    report = _mapping(given, "report", KEYS)
    table, shown = report.get("table"), report.get("transcripts")
    transcripts = None
    if shown:
        shown = _mapping(shown, "report.transcripts", ("stage", "num"))
        transcripts = (_stage(shown.get("stage"), "report.transcripts", stages), int(shown.get("num", 3)))
    export = report.get("export")
    return Spec(
        tuple(_row(row, "report.success", stages) for row in _list(report.get("success"), "report.success")),
        _table(table, stages) if table else None,
        transcripts,
        None if export is None else _stage(export, "report.export", stages),
        tuple(stages),
    )


def _table(given: object, stages: Collection[str]) -> Table:
    table = _mapping(given, "report.table", TABLE_KEYS)
    columns = tuple(_column(metric) for metric in _list(table.get("metrics"), "report.table.metrics"))
    if not columns:
        raise UserError("report.table.metrics is empty; name keys of the metrics in evaluation.jsonl, e.g. [success].")
    rows = [_row(row, "report.table.stages", stages) for row in _list(table.get("stages"), "report.table.stages")]
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        raise UserError(f"report.table.stages: labels must differ, but they are {', '.join(labels)}.")
    return Table(columns, tuple(rows) or None, str(table.get("title", TITLE)), table.get("name"))


def _column(given: object) -> Column:
    metric = {"key": given} if isinstance(given, str) else _mapping(given, "report.table.metrics", METRIC_KEYS)
    if not metric.get("key"):
        raise UserError(f"report.table.metrics: {given!r} has no `key`.")
    key = str(metric["key"])
    return Column(key, str(metric.get("label", key)), bool(metric.get("percent", key.startswith(SHARES))))


def _row(given: object, place: str, stages: Collection[str]) -> Row:
    row = {"stage": given} if isinstance(given, str) else _mapping(given, place, ROW_KEYS)
    stage = _stage(row.get("stage"), place, stages)
    which = row.get("which", "last")
    if which not in ("first", "last"):
        raise UserError(f"{place}: which={which!r} of stage {stage!r} must be first or last.")
    return Row(str(row.get("label", stage)), stage, which)


def _stage(name: object, place: str, stages: Collection[str]) -> str:
    if name not in stages:
        raise UserError(f"{place}: stage {name!r} is none of {', '.join(stages)}.")
    return str(name)


def _mapping(given: object, place: str, allowed: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"{place} must be a mapping with the keys {', '.join(allowed)}; it is {given!r}.")
    unknown = sorted(set(map(str, given)) - set(allowed))
    if unknown:
        raise UserError(f"{place} has unknown keys {unknown}; allowed are {', '.join(allowed)}.")
    return given


def _list(given: object, place: str) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise UserError(f"{place} must be a list; it is {given!r}.")
    return given
