"""Which of the offered actions a reply means: the reply as a whole, never a word somewhere in it."""

from __future__ import annotations

from collections.abc import Container

from lit_agentrl.envs.actions import ActionFormat, parse_action


def choose(reply: str, offered: Container[str], action_format: ActionFormat) -> str | None:
    """The offered action that the reply is, None where it is none of them.

    Looking for an action inside a reply would read "do not go down, go right" as "down" and "upright" as "up".
    """
    action = parse_action(reply, action_format)
    if action is None:
        return None
    action = normalize(action)
    return action if action in offered else None


def normalize(action: str) -> str:
    """The action in lower case, with single spaces, without quotes, a leading `>` and a final period."""
    return " ".join(action.lower().strip(" \t>.\"'`“”‘’").split())
