"""What the policy is told: the message that opens an episode, and the sentence after a turn that was no action."""

from __future__ import annotations

from collections.abc import Sequence

from lit_agentrl.envs.search.parse import OPEN
from lit_agentrl.errors import UserError

SEARCH_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
"""The template of Search-R1 (arXiv 2503.09516, Table 1), which Tree-GRPO trains with, word for word."""
WEB_PROMPT = (
    "Answer the question with the help of a search engine. Think inside <think> and </think> first, every time you get "
    "new information. Then do one of three things. <search> query </search> lists pages, each with its title, its ID "
    "and a snippet. <open> ID </open> shows the page with this ID. Both are answered between <information> and "
    "</information>. When you know enough, give the answer, short and without an explanation, inside <answer> and "
    "</answer>. For example, <answer> Beijing </answer>. Question: {question}\n"
)
"""Our own: the paper's setting of the web task is not published."""

_USES = {
    "search": "<search> query </search> to search",
    OPEN: "<open> ID </open> to open a page",
}


def check_prompt(prompt: str) -> None:
    """Refuse a template without a place for the question.

    Raises:
        UserError: `{question}` is not in it.
    """
    if "{question}" not in prompt:
        raise UserError(f"prompt={prompt[:80]!r} has no {{question}}, so the policy would not know what is asked.")


def correction(tools: Sequence[str]) -> str:
    """What is shown after a turn without an action, laid out like an information block.

    It is an observation, so it is never trained on and never judged (the reference parses its own correction, whose
    tags make the form invalid and whose "and" can become the answer).
    """
    uses = ", ".join(_USES[tool] for tool in tools)
    return f"\n\nThe last turn held no action. Write {uses}, or <answer> answer </answer> to finish.\n\n"
