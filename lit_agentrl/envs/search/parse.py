"""From a turn's text to the action that it means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

ANSWER = "answer"
SEARCH = "search"
OPEN = "open"
THINK = "think"
INFORMATION = "information"


@dataclass(frozen=True, slots=True)
class Action:
    """What a turn decides."""

    tag: str
    """The tool it calls, such as "search", or "answer"."""
    text: str
    """What stands between the tags, outer white space removed; never empty."""


def parse_turn(text: str, tools: Sequence[str] = (SEARCH,)) -> Action | None:
    """The first complete `<tool>...</tool>` or `<answer>...</answer>` outside the thoughts; None where there is none.

    Tags count as they are written in the prompt: `<SEARCH>` is text. A block in `<think>...</think>` is an idea, not a
    decision, and so is everything after a `<think>` that is never closed. An unclosed block is passed over. An empty
    first block means that there is no action, whatever follows.

    The time is linear in the text: a tag that is not closed anywhere is not looked for again.
    """
    opening, never_closed, place = _openings(tuple(tools)), set[str](), 0
    while found := opening.search(text, place):
        tag, place = found[1], found.end()
        if tag in never_closed:
            continue
        end = text.find(f"</{tag}>", place)
        if tag == THINK:
            if end < 0:
                return None
            place = end + len("</think>")
        elif end < 0:
            never_closed.add(tag)
        else:
            content = text[place:end].strip()
            return Action(tag, content) if content else None
    return None


@lru_cache
def _openings(tools: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"<({'|'.join((THINK, *tools, ANSWER))})>")
