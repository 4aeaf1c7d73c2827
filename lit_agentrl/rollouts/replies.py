"""What a reply comes down to, where an episode's history is retold."""

from __future__ import annotations

from lit_agentrl.envs.actions import parse_action

LONGEST = 200
"""Characters kept of a reply without an action: a rambling answer must not fill the next prompts."""


def decision(reply: str) -> str:
    """The action in a reply of either format: the last `<action>` block, else the first line after the thoughts.

    An environment parses the reply for itself; this is for what is shown of it later, and for comparing histories.
    """
    action = parse_action(reply, "tagged")
    if action is None:
        action = parse_action(reply.rpartition("</think>")[2], "plain") or ""
    return action[:LONGEST]
