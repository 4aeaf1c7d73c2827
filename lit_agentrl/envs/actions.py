"""From a policy's reply to the action that it means."""

from __future__ import annotations

import re
from typing import Literal

from lit_agentrl.errors import UserError

ActionFormat = Literal["plain", "tagged"]

_TAGGED = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
_HINTS: dict[ActionFormat, str] = {
    "plain": "Answer with one action and nothing else.",
    "tagged": "Reason first inside <think> </think>, then give one action inside <action> </action>.",
}


def check_action_format(action_format: str) -> None:
    """Refuse an unknown format.

    Raises:
        UserError: It is neither `plain` nor `tagged`.
    """
    if action_format not in _HINTS:
        raise UserError(f"action_format={action_format!r} is unknown; allowed are {', '.join(_HINTS)}.")


def parse_action(reply: str, action_format: ActionFormat) -> str | None:
    """The action of a reply as it was written, outer white space removed; None where there is none.

    `plain` is the first line that is not empty. `tagged` is what the last `<action>` block after the thoughts holds:
    one inside `<think>` is an idea, not a decision. An empty block, an unclosed one, and thoughts without an end give
    None.
    """
    if action_format == "plain":
        return next((line.strip() for line in reply.splitlines() if line.strip()), None)
    _, closed, decision = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        return None
    blocks: list[str] = _TAGGED.findall(decision)
    return blocks[-1].strip() or None if blocks else None


def format_hint(action_format: ActionFormat) -> str:
    """One sentence for the system prompt: how to answer."""
    return _HINTS[action_format]


def as_reply(action: str, action_format: ActionFormat) -> str:
    """The shortest reply that means `action`: what a walkthrough says."""
    return action if action_format == "plain" else f"<action>{action}</action>"
