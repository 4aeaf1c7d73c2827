"""Tables and sentences as a terminal, a Markdown or an HTML page shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_agentrl.callbacks.transcripts import LOG_FILE_WIDTH

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.verdicts { background: #f3f6fa; padding: .8rem 1.2rem .8rem 2.2rem; border-left: 4px solid #0072B2; }
svg { width: 100%; height: auto; }
"""


@dataclass(slots=True)
class Sheet:
    """A table; its first column is text, the others are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    lines: list[str]
    """Sentences below it."""


def new_console() -> Console:
    """A console that is wide where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_FILE_WIDTH)


def show_sheet(console: Console, sheet: Sheet) -> None:
    """Print a table and what stands below it."""
    if sheet.rows:
        table = Table(title=Text(sheet.title), title_justify="left")
        for place, column in enumerate(sheet.columns):
            table.add_column(Text(column), justify="right" if place else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))  # an interval is not torn in two
        console.print(table)
    for line in sheet.lines:
        console.print(Text(line, style="dim"))


def markdown_sheet(sheet: Sheet) -> list[str]:
    """The lines of a section."""
    lines = [f"## {plain(sheet.title)}", ""]
    if sheet.rows:
        lines.append(f"| {' | '.join(map(plain, sheet.columns))} |")
        lines.append("|---|" + "---:|" * (len(sheet.columns) - 1))
        lines += [f"| {' | '.join(map(plain, row))} |" for row in sheet.rows]
        lines.append("")
    for line in sheet.lines:
        lines += [plain(line), ""]
    return lines


def plain(text: str) -> str:
    """`text` without meaning to Markdown."""
    return re.sub(r"([\\`*_|\[\]<>#])", r"\\\1", " ".join(text.split()))


def html_sheet(sheet: Sheet) -> list[str]:
    """The parts of a section."""
    parts = [f"<h2>{escape(sheet.title)}</h2>"]
    if sheet.rows:
        head = "".join(f"<th>{escape(column)}</th>" for column in sheet.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in sheet.rows)
        parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
    return parts + [f"<p>{escape(line)}</p>" for line in sheet.lines]


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page that needs no other file; `parts` are HTML already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
