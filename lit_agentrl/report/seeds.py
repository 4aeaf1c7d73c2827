"""Several seeds of one pipeline: the mean of every cell of their tables, with intervals over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_agentrl.errors import UserError
from lit_agentrl.report.intervals import Estimate, estimate
from lit_agentrl.report.page import Sheet, markdown_sheet
from lit_agentrl.report.panel import cell
from lit_agentrl.report.spec import Column


@dataclass(slots=True)
class SeedTable:
    """The tables of S seeds, one on the other."""

    columns: list[Column]
    values: dict[str, dict[str, NDArray[np.float64]]]
    """By the rows' labels and the metrics' keys, [S]; NaN where a seed has no number."""

    def mean(self, label: str, key: str) -> Estimate | None:
        """The mean over the seeds that have a number, with its 95 % interval (Student's t); None without any."""
        return _mean(self.values[label][key])

    def difference(self, label: str, key: str, other: str) -> Estimate | None:
        """`label` minus `other`, paired by seed."""
        return _mean(self.values[label][key] - self.values[other][key])

    def sheets(self) -> list[Sheet]:
        """The means, and each row's differences to the row before it."""
        num_seeds = len(next(iter(next(iter(self.values.values())).values())))
        names, labels = [column.label for column in self.columns], list(self.values)
        over = f"mean over {num_seeds} seed{'s' if num_seeds > 1 else ''}"
        note = (
            ["Brackets are 95 % intervals over seeds."] if num_seeds > 1 else ["One seed: nothing is known of others."]
        )
        means = [[label, *(cell(self.mean(label, c.key), c.is_percent) for c in self.columns)] for label in labels]
        steps = [
            [
                f"{label} - {before}",
                *(cell(self.difference(label, c.key, before), c.is_percent, is_difference=True) for c in self.columns),
            ]
            for before, label in pairwise(labels)
        ]
        found = [Sheet(f"Stages, {over}", ["stage", *names], means, note)]
        if steps:
            found.append(Sheet(f"From stage to stage, {over}, paired by seed", ["change", *names], steps, []))
        return found

    def markdown(self) -> str:
        """Both tables."""
        return "\n".join(line for sheet in self.sheets() for line in markdown_sheet(sheet))


def over_seeds(roots: Sequence[str | Path]) -> SeedTable:
    """Put the tables of several roots of the same pipeline together.

    Args:
        roots: Folders with a report.json that has a table, one for each seed.

    Raises:
        UserError: A folder has none, or tables have other rows, other metrics or other numbers of tasks.
    """
    tables = [_table(Path(root)) for root in roots]
    if not tables:
        raise UserError("over_seeds needs at least one folder.")
    shapes = [
        ([m["key"] for m in table["metrics"]], [(row["label"], row["num_tasks"]) for row in table["rows"]])
        for table in tables
    ]
    for root, shape in zip(roots, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(f"{root} has another table than {roots[0]}: {shape} and {shapes[0]}.")
    columns = [Column(m["key"], m["label"], m["percent"]) for m in tables[0]["metrics"]]
    rows = [{row["label"]: row["values"] for row in table["rows"]} for table in tables]
    values = {
        label: {c.key: np.array([_number(of_seed[label][c.key]) for of_seed in rows]) for c in columns}
        for label in rows[0]
    }
    return SeedTable(columns, values)


def _table(root: Path) -> dict[str, list[dict[str, Any]]]:
    path = root / "report.json"
    table = json.loads(path.read_text(encoding="utf-8")).get("table") if path.is_file() else None
    if not table:
        raise UserError(f"{path} has no table: let the pipeline end with a `report: {{table: ...}}`.")
    return dict(table)


def _number(found: dict[str, float] | None) -> float:
    return float("nan") if found is None else float(found["value"])


def _mean(values: NDArray[np.float64]) -> Estimate | None:
    there = values[np.isfinite(values)]
    return estimate(there[:, None]) if there.size else None
