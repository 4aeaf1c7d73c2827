"""Whether a response has the form that the prompt asks for: (think tool information)* think answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from lit_agentrl.envs.search.parse import ANSWER, INFORMATION, SEARCH, THINK

Turn = tuple[str, str]
"""What the policy wrote, and the observation that followed; empty after the last turn."""


def is_well_formed(turns: Sequence[Turn], tools: Sequence[str] = (SEARCH,)) -> bool:
    """Whether every turn but the last is `<think>...</think> <tool>...</tool>`, and the last ends with `<answer>`.

    Between the blocks of a turn, and around them, there is white space alone. What stands in a block is free, except
    that it holds none of the tags, and that a call or an answer is not empty.

    Only the policy's words are judged. The observations are known apart, so an environment that cuts one, or shows the
    tags in a correction, costs the policy nothing; and an `<information>` block in a turn is one the policy made up.
    """
    decisions = [_decision(action, tuple(tools)) for action, _ in turns]
    return bool(decisions) and decisions[-1] == ANSWER and all(decision in tools for decision in decisions[:-1])


def _decision(action: str, tools: tuple[str, ...]) -> str | None:
    """The tag after the thoughts of a turn that is exactly `think, tool or answer`; None for any other turn."""
    pieces = _tags(tools).split(action)  # text, tag, text, tag, ..., text
    texts, tags = pieces[::2], pieces[1::2]
    if len(tags) != 4 or tags[:2] != [f"<{THINK}>", f"</{THINK}>"]:
        return None
    before, _, between, content, after = texts
    tag = tags[2][1:-1]
    if tag not in (*tools, ANSWER) or tags[3] != f"</{tag}>":
        return None
    return tag if content.strip() and not (before + between + after).strip() else None


@lru_cache
def _tags(tools: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"(</?(?:{'|'.join((THINK, *tools, INFORMATION, ANSWER))})>)")
