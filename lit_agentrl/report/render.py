"""A comparison in the terminal, and as report.md, report.json, report.html and report.png."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_agentrl.callbacks.transcripts import LOG_FILE_WIDTH
from lit_agentrl.files import replace_atomically, write_text
from lit_agentrl.report.comparison import Comparison
from lit_agentrl.report.plot import picture
from lit_agentrl.report.sheets import Sheet, introduction, sheets, verdicts

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.verdicts { background: #f3f6fa; padding: .8rem 1.2rem .8rem 2.2rem; border-left: 4px solid #0072B2; }
svg { width: 100%; height: auto; }
"""


def write_report(comparison: Comparison, folder: Path, plot: bool) -> None:
    """Print the report and write its files."""
    show(comparison)
    write_text(folder / "report.json", json.dumps(comparison.as_dict(), indent=1, default=str) + "\n")
    write_text(folder / "report.md", markdown(comparison, plot))
    write_text(folder / "report.html", html(comparison, plot))
    names = ["report.md", "report.json", "report.html"]
    if plot:
        image = picture(comparison, "png")
        replace_atomically(folder / "report.png", lambda file: file.write(image))
        names.append("report.png")
    print(f"written to {folder}: {', '.join(names)}")


def show(comparison: Comparison) -> None:
    """Print tables and verdicts."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_FILE_WIDTH)
    console.print(Text(f"\n{comparison.name}", style="bold"))
    for line in introduction(comparison):
        console.print(Text(line))
    for sheet in sheets(comparison):
        if sheet.rows:
            console.print(_rich(sheet))
        for line in sheet.lines:
            console.print(Text(line, style="dim"))
    for line in verdicts(comparison):
        console.print(Text(line, style="bold"))


def _rich(sheet: Sheet) -> Table:
    table = Table(title=Text(sheet.title), title_justify="left")
    for place, column in enumerate(sheet.columns):
        table.add_column(Text(column), justify="right" if place else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))  # an interval is not torn in two
    return table


def markdown(comparison: Comparison, plot: bool) -> str:
    """The report as Markdown, beside its picture."""
    lines = [f"# {_cell(comparison.name)}", ""]
    for line in introduction(comparison):
        lines += [_cell(line), ""]
    lines += [*(f"- **{_cell(line)}**" for line in verdicts(comparison)), ""]
    if plot:
        lines += ["![The metric against what was spent](report.png)", ""]
    for sheet in sheets(comparison):
        lines += [f"## {_cell(sheet.title)}", ""]
        if sheet.rows:
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in [sheet.columns]]
            lines += ["|---|" + "---:|" * (len(sheet.columns) - 1)]
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in sheet.rows]
            lines.append("")
        for line in sheet.lines:
            lines += [_cell(line), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """`text` without meaning to Markdown."""
    return re.sub(r"([\\`*_|\[\]<>#])", r"\\\1", " ".join(text.split()))


def html(comparison: Comparison, plot: bool) -> str:
    """The report as one page that needs no other file."""
    parts = [f"<h1>{escape(comparison.name)}</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in introduction(comparison)]
    parts.append(f'<ul class="verdicts">{"".join(f"<li>{escape(v)}</li>" for v in verdicts(comparison))}</ul>')
    if plot:
        text = picture(comparison, "svg").decode("utf-8")
        parts.append(text[text.index("<svg") :])  # without the XML declaration, which has no place inside a page
    for sheet in sheets(comparison):
        parts.append(f"<h2>{escape(sheet.title)}</h2>")
        if sheet.rows:
            head = "".join(f"<th>{escape(column)}</th>" for column in sheet.columns)
            body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in sheet.rows)
            parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
        parts += [f"<p>{escape(line)}</p>" for line in sheet.lines]
    title = escape(comparison.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
