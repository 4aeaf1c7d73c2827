"""A comparison in the terminal, and as report.md, report.json, report.html and report.png."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from rich.text import Text

from lit_agentrl.files import replace_atomically, write_text
from lit_agentrl.report.comparison import Comparison
from lit_agentrl.report.page import html_page, html_sheet, markdown_sheet, new_console, plain, show_sheet
from lit_agentrl.report.plot import picture
from lit_agentrl.report.sheets import introduction, sheets, verdicts


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
    console = new_console()
    console.print(Text(f"\n{comparison.name}", style="bold"))
    for line in introduction(comparison):
        console.print(Text(line))
    for sheet in sheets(comparison):
        show_sheet(console, sheet)
    for line in verdicts(comparison):
        console.print(Text(line, style="bold"))


def markdown(comparison: Comparison, plot: bool) -> str:
    """The report as Markdown, beside its picture."""
    lines = [f"# {plain(comparison.name)}", ""]
    for line in introduction(comparison):
        lines += [plain(line), ""]
    lines += [*(f"- **{plain(line)}**" for line in verdicts(comparison)), ""]
    if plot:
        lines += ["![The metric against what was spent](report.png)", ""]
    for sheet in sheets(comparison):
        lines += markdown_sheet(sheet)
    return "\n".join(lines)


def html(comparison: Comparison, plot: bool) -> str:
    """The report as one page that needs no other file."""
    parts = [f"<h1>{escape(comparison.name)}</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in introduction(comparison)]
    parts.append(f'<ul class="verdicts">{"".join(f"<li>{escape(v)}</li>" for v in verdicts(comparison))}</ul>')
    if plot:
        text = picture(comparison, "svg").decode("utf-8")
        parts.append(text[text.index("<svg") :])  # without the XML declaration, which has no place inside a page
    for sheet in sheets(comparison):
        parts += html_sheet(sheet)
    return html_page(comparison.name, parts)
