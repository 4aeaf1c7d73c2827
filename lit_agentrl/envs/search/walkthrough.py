"""Plays that know the answer, as supervised examples of the form."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from lit_agentrl.envs.search.environment import SearchEnvironment, plain_title
from lit_agentrl.envs.search.format import is_well_formed
from lit_agentrl.envs.search.information import neutralise
from lit_agentrl.envs.search.parse import ANSWER, OPEN, SEARCH
from lit_agentrl.envs.search.questions import Question
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation


def turn(thought: str, tag: str, text: str) -> str:
    """A turn of the right form."""
    return f"<think> {thought} </think>\n<{tag}> {text} </{tag}>"


def play(environment: SearchEnvironment, question: Question, tools: Sequence[str]) -> Conversation:
    """Every observation and the turn after it, to the end.

    Raises:
        UserError: No spelling of the answer can be given, or a call failed.
    """
    answer = _answer(question, tools)
    observation, conversation = environment.reset(), []
    for call in _calls(environment, question, tools):
        if environment.must_answer:
            break
        conversation.append((observation, call))
        observation, _, _ = environment.step(call)
        if environment.metrics["search_failures"]:
            raise UserError(f"{question.key!r} has no walkthrough, a call failed: {observation.state}")
    return [*conversation, (observation, answer)]


def _calls(environment: SearchEnvironment, question: Question, tools: Sequence[str]) -> Iterator[str]:
    """The calls of a play, one at a time: what to open depends on what the searches before it have shown."""
    yield turn("I need to find out what is asked, so I search for it.", SEARCH, neutralise(question.text))
    for title in question.titles:
        name = neutralise(html.unescape(title))
        if OPEN not in tools or _page(environment, title) is None:
            yield turn(f"I should look for {name}.", SEARCH, name)
        if OPEN in tools and (page := _page(environment, title)):
            yield turn(f"The page about {name} should help.", OPEN, page)


def _page(environment: SearchEnvironment, title: str) -> str | None:
    """The id of a page of this title, if the episode has been shown one."""
    wanted = plain_title(title)
    return min((sight.key for _, sight in environment.sights if plain_title(sight.title) == wanted), default=None)


def _answer(question: Question, tools: Sequence[str]) -> str:
    """The turn with the first spelling of the answer that its own tags can hold."""
    for answer in question.answers:
        reply = turn("I know the answer now.", ANSWER, answer)
        if is_well_formed([(reply, "")], tools):
            return reply
    raise UserError(f"The answer of {question.key!r} holds tags of the environment, so no walkthrough can give it.")
