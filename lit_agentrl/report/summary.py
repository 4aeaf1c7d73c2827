"""The end of a pipeline: what each stage scored on held-out tasks, sample transcripts, and where the model is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_agentrl.callbacks.evaluation import EvaluationRecord
from lit_agentrl.callbacks.records import render_transcript, sample_records
from lit_agentrl.files import write_text
from lit_agentrl.report.page import Sheet, html_page, html_sheet, markdown_sheet, new_console, plain, show_sheet
from lit_agentrl.report.panel import Panel, make_panel, pick
from lit_agentrl.report.spec import Spec


def show(spec: Spec, runs: Mapping[str, Path], folder: Path, exports: Mapping[str, Path]) -> None:
    """Print the report that a pipeline file asks for; its tables are written to `folder` as well.

    Args:
        spec: What it asks for.
        runs: The run folder of every stage, in order.
        folder: Where report.md, report.json and report.html go.
        exports: What stages leave.
    """
    success = [(row.label, pick(row, runs)) for row in spec.success]
    panel = make_panel(spec.table, runs) if spec.table else None
    export = exports.get(spec.export) if spec.export else None
    sheets = ([success_sheet(success)] if success else []) + ([panel.sheet()] if panel else [])
    console = new_console()
    for sheet in sheets:
        show_sheet(console, sheet)
    if spec.transcripts:
        _show_transcripts(console, runs[spec.transcripts[0]], spec.transcripts[1])
    if sheets:
        _write(folder, sheets, _as_dict(success, panel, export), export)
        print(f"written to {folder}: report.md, report.json, report.html")
    if export is not None:
        print(f"Hugging Face folder of the trained policy: {export}")  # print: never wrapped


def success_sheet(rows: list[tuple[str, EvaluationRecord]]) -> Sheet:
    """Success with its 95 % interval, reward and length, a row each evaluation."""
    columns = ["policy", "success", "95 % interval", "mean reward", "steps", "tasks"]
    cells = []
    for label, record in rows:
        metrics = record["metrics"]
        interval = f"{_percent(metrics['success_low'])} - {_percent(metrics['success_high'])}"
        reward, steps = f"{metrics['reward/mean'] or 0.0:.3f}", f"{metrics['length/steps'] or 0.0:.2f}"
        cells.append([label, _percent(metrics["success"]), interval, reward, steps, str(record["num_tasks"])])
    return Sheet("Success on held-out tasks", columns, cells, [])


def _as_dict(success: list[tuple[str, EvaluationRecord]], panel: Panel | None, export: Path | None) -> dict[str, Any]:
    return {
        "success": [{"label": label, **record} for label, record in success],
        "table": panel.as_dict() if panel else None,
        "export": None if export is None else str(export),
    }


def _write(folder: Path, sheets: list[Sheet], values: dict[str, Any], export: Path | None) -> None:
    """The tables as files, each whole or not at all."""
    title, closing = f"Pipeline {folder.name}", "" if export is None else f"Trained policy: {export}"
    lines = [f"# {plain(title)}", "", *(line for sheet in sheets for line in markdown_sheet(sheet)), plain(closing), ""]
    parts = [f"<h1>{escape(title)}</h1>", *(part for sheet in sheets for part in html_sheet(sheet))]
    write_text(folder / "report.json", json.dumps(values, indent=1) + "\n")
    write_text(folder / "report.md", "\n".join(lines).rstrip() + "\n")
    write_text(folder / "report.html", html_page(title, [*parts, f"<p>{escape(closing)}</p>"]))


def _show_transcripts(console: Console, run: Path, num: int) -> None:
    """Episodes of the run's newest evaluation, from the lowest reward to the highest."""
    files = sorted((run / "transcripts").glob("eval_*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        print(f"{run} has no transcripts to show.")
        return
    records = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    for record in sample_records(records, num):
        console.print(render_transcript(record))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
