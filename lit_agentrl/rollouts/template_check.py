"""Finds the line of a chat template that renders an earlier turn differently once later turns follow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from jinja2 import TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
_SUSPECTS = ("</think>", "split(", "last_query", "loop.last", "loop.index", "reasoning", "[-1]", "content =")


def rewriting_line(template: str, earlier: list[Message], later: list[Message]) -> str:
    """A sentence that names the guilty line, found by comparing which lines run for both conversations.

    The last answer of `later` is history there and the answer being given in `earlier`; the lines that run only for
    `later`, and that touch the text of messages, are the ones that rewrite.
    """
    try:
        ran = _lines_run(template, later) - _lines_run(template, earlier)
    except (TemplateError, TypeError):
        ran = set()
    lines = template.split("\n")
    candidates = [n for n in sorted(ran) if any(mark in lines[n - 1] for mark in _SUSPECTS)]
    candidates = candidates or [n for n, line in enumerate(lines, 1) if any(mark in line for mark in _SUSPECTS[:3])]
    if not candidates:
        return "No single line of the template could be named as the cause."
    number = candidates[0]
    return f"Line {number} of the template does it: {lines[number - 1].strip()[:160]!r}."


def _lines_run(template: str, messages: list[Message]) -> set[int]:
    """The template's line numbers that execute while rendering."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], undefined=Undefined
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: pattern
    compiled = environment.from_string(template)
    code = compiled.root_render_func.__code__.co_filename
    seen: set[int] = set()

    def trace(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != code:
            return None
        seen.add(compiled.get_corresponding_lineno(frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        compiled.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="", tools=None)
    finally:
        sys.settrace(before)
    return seen


def _raise(message: str) -> None:
    raise TemplateError(message)
