"""One question: call tools for a few turns, then answer."""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from lit_agentrl.envs.search.format import Turn, is_well_formed
from lit_agentrl.envs.search.information import information
from lit_agentrl.envs.search.parse import ANSWER, Action, parse_turn
from lit_agentrl.envs.search.payment import Payment
from lit_agentrl.envs.search.prompts import correction
from lit_agentrl.envs.search.questions import Question
from lit_agentrl.envs.search.scores import exact_match, token_f1
from lit_agentrl.envs.search.tools import Result, Sight, Tool
from lit_agentrl.types import Observation


@dataclass(frozen=True, slots=True)
class State:
    """Where an episode is: a value that no step changes, so a snapshot is a reference."""

    turns: tuple[Turn, ...] = ()
    calls: tuple[str, ...] = ()
    """The tag of every call so far, those that failed included."""
    sights: frozenset[tuple[str, Sight]] = frozenset()
    """The passages shown, each with the tag that showed it: a snippet tells less than its page."""
    failures: int = 0
    cut_observations: int = 0
    cut_arguments: int = 0
    invalid_actions: int = 0
    done: bool = False
    answer: str | None = None
    em: float = 0.0
    f1: float = 0.0
    well_formed: bool = False


@dataclass(frozen=True)
class Rules:
    """What all episodes of a suite have in common."""

    max_turns: int
    """Turns that may call a tool; one more may only answer."""
    max_argument_chars: int
    """Characters of a call that are passed on."""
    prompt: str
    """The one user message, with `{question}` where the question goes."""
    payment: Payment


class SearchEnvironment:
    """One episode of a question.

    The first `max_turns` turns may call a tool or answer. A turn without an action that can be used is told so, and
    counts. The turn after them can only answer, and ends the episode whatever it is, so an episode has at most
    `max_turns + 1` actions. The reward is paid at its end.

    Args:
        task: The question's id in its suite.
        question: What is asked, and its answers.
        tools: What can be called, by tag.
        rules: What holds for all episodes.
    """

    def __init__(self, task: str, question: Question, tools: Mapping[str, Tool], rules: Rules) -> None:
        self._task, self._question, self._tools, self._rules = task, question, tools, rules
        self._prompt = rules.prompt.replace("{question}", question.text)
        self._state = State()

    def reset(self) -> Observation:
        """The prompt. No later turn repeats its example, and nothing but the policy's own words is ever parsed."""
        return Observation(self._prompt, task=self._prompt)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What the turn gave, its reward, and whether the episode is over.

        The first complete call or answer of the text is carried out; what follows it is not.
        """
        if self._state.done:
            return Observation("", task=self._prompt, valid=False), 0.0, True
        decision = parse_turn(action, self.tools)
        if decision is not None and decision.tag == ANSWER:
            return self._finish(action, decision.text)
        if self.must_answer:
            return self._finish(action, None)
        if decision is None:
            return self._correct(action)
        return self._call(action, decision)

    @property
    def anchor(self) -> Hashable:
        """The question, the passages shown so far in any order, and whether only an answer is left."""
        shown = sorted((tag, sight.key, sight.title) for tag, sight in self._state.sights)
        return self._task, tuple(shown), self.must_answer

    @property
    def success(self) -> bool:
        """Whether the answer is an exact match."""
        return self._state.em == 1.0

    @property
    def metrics(self) -> dict[str, float]:
        """Scores, form and counts so far; `gold_recall`, the share of the supporting titles shown, where known."""
        state = self._state
        numbers = {
            "tool_calls": len(state.calls),
            "search_failures": state.failures,
            "invalid_actions": state.invalid_actions,
            "truncated_observations": state.cut_observations,
            "truncated_queries": state.cut_arguments,
            "em": state.em,
            "f1": state.f1,
            "format": state.well_formed,
            "answered": state.answer is not None,
        }
        if wanted := {plain_title(title) for title in self._question.titles}:
            numbers["gold_recall"] = len(wanted & {plain_title(sight.title) for _, sight in state.sights}) / len(wanted)
        return {name: float(number) for name, number in numbers.items()}

    @property
    def answer(self) -> str | None:
        """What was answered; None before, and where the episode ended without."""
        return self._state.answer

    @property
    def tools(self) -> tuple[str, ...]:
        """The tags of what can be called."""
        return tuple(self._tools)

    @property
    def calls(self) -> tuple[str, ...]:
        """The tag of every call so far."""
        return self._state.calls

    @property
    def sights(self) -> frozenset[tuple[str, Sight]]:
        """The passages shown so far, each with the tag that showed it."""
        return self._state.sights

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What the policy wrote and was shown so far."""
        return self._state.turns

    @property
    def must_answer(self) -> bool:
        """Whether the next turn can only answer."""
        return len(self._state.turns) >= self._rules.max_turns

    def snapshot(self) -> object:
        """The state, which nothing changes."""
        return self._state

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this question, of this episode or another."""
        assert isinstance(snapshot, State)
        self._state = snapshot

    def close(self) -> None:
        """Nothing is held."""

    def _call(self, action: str, decision: Action) -> tuple[Observation, float, bool]:
        whole = " ".join(decision.text.split())
        argument = whole[: self._rules.max_argument_chars]
        seen = {sight.key for _, sight in self._state.sights}
        result = self._tools[decision.tag].call(argument, seen)
        shown = information(result.text)
        self._state = self._after_call(action, decision.tag, result, shown, len(argument) < len(whole))
        return Observation(shown, state=shown.strip(), task=self._prompt, valid=True), 0.0, False

    def _after_call(self, action: str, tag: str, result: Result, shown: str, cut_argument: bool) -> State:
        state = self._state
        return replace(
            state,
            turns=(*state.turns, (action, shown)),
            calls=(*state.calls, tag),
            sights=state.sights | {(tag, sight) for sight in result.sights},
            failures=state.failures + result.failed,
            cut_observations=state.cut_observations + result.is_cut,
            cut_arguments=state.cut_arguments + cut_argument,
        )

    def _correct(self, action: str) -> tuple[Observation, float, bool]:
        told = correction(self.tools)
        turns = (*self._state.turns, (action, told))
        self._state = replace(self._state, turns=turns, invalid_actions=self._state.invalid_actions + 1)
        return Observation(told, state=told.strip(), task=self._prompt, valid=False), 0.0, False

    def _finish(self, action: str, answer: str | None) -> tuple[Observation, float, bool]:
        """Score the answer and the form, once."""
        turns = (*self._state.turns, (action, ""))
        answered = answer is not None
        em = exact_match(answer, self._question.answers) if answer is not None else 0.0
        f1 = token_f1(answer, self._question.answers) if answer is not None else 0.0
        well_formed = is_well_formed(turns, self.tools)
        self._state = replace(
            self._state,
            turns=turns,
            done=True,
            answer=answer,
            em=em,
            f1=f1,
            well_formed=well_formed,
            invalid_actions=self._state.invalid_actions + (not answered),
        )
        reward = self._rules.payment.pay(em, f1, answered=answered, well_formed=well_formed)
        return Observation("", task=self._prompt, valid=answered), reward, True


def plain_title(title: str) -> str:
    """A title for comparing: HotpotQA's are HTML, a corpus may have them in quotes."""
    return html.unescape(title).strip().strip('"').strip().casefold()
