"""Agent programs as environments: code that calls a model over HTTP, unmodified, with the policy as its model.

Control is turned round: a program runs by itself and asks; its request is the policy's next observation, and the
policy's action is what it is answered.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from queue import Empty, SimpleQueue
from typing import Literal

from lit_agentrl.envs.chat_completions import ChatMessage
from lit_agentrl.envs.endpoint import ChatEndpoint, ChatRequest, chat_server
from lit_agentrl.envs.pool import EnvironmentTimeoutError
from lit_agentrl.errors import UserError
from lit_agentrl.types import EnvironmentSuite, Observation

History = Literal["append", "whole"]


@dataclass(frozen=True)
class ProgramResult:
    """What a program's episode came to."""

    reward: float
    """Paid for the last answer; the others earn 0."""
    success: bool
    """Whether the task was solved."""


Program = Callable[[str], ProgramResult]
"""Plays one episode against the chat endpoint at the base URL it is given."""


class ProgramError(RuntimeError):
    """The program raised, ended without a question, or asked what cannot follow."""


class ProgramSuite(EnvironmentSuite):
    """Agent code of one's own: write `run`, `tasks`, and nothing else.

    Args:
        history: `append`: every request continues the conversation so far, and the policy's context grows by what is
            new. `whole`: a program may rewrite its history or hold several conversations; every observation shows
            the whole request, for prompts that are rebuilt at every step (`data.chat: rebuild`).
        seconds: How long a program may take to its next request or its end, less than `data.step_deadline`.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(self, history: History = "append", seconds: float = 50.0) -> None:
        check_program_options(history, seconds)
        self.history, self.seconds = history, seconds

    @abstractmethod
    def run(self, task: str, base_url: str) -> ProgramResult:
        """Play one episode of `task`, asking the model at `base_url`. Runs in a thread of its own."""

    def make(self, task: str) -> ProgramEnvironment:
        """An episode; its program starts when it is reset."""
        return ProgramEnvironment(lambda base_url: self.run(task, base_url), self.history, self.seconds)


class ProgramEnvironment:
    """One run of a program.

    A program that is left (`close`, a missed deadline) has its requests refused with 410, which ends it where it asks
    again; one that never does keeps its thread until it ends.

    Args:
        program: What to run.
        history: As in `ProgramSuite`.
        seconds: As in `ProgramSuite`.
    """

    def __init__(self, program: Program, history: History = "append", seconds: float = 50.0) -> None:
        check_program_options(history, seconds)
        self.program, self.history, self.seconds = program, history, seconds
        self.success = False
        # None: closed. Requests that a program makes at the same time wait their turn here.
        self._events: SimpleQueue[ChatRequest | ProgramResult | BaseException | None] = SimpleQueue()
        self._endpoint: ChatEndpoint | None = None
        self._request: ChatRequest | None = None
        self._system: Sequence[ChatMessage] = ()
        self._conversation: tuple[ChatMessage, ...] = ()

    def reset(self) -> Observation:
        """The program's first request: its system messages, and the rest as text.

        Raises:
            ProgramError: It failed or ended before it asked.
            EnvironmentTimeoutError: It did neither in time.
        """
        endpoint = self._endpoint = chat_server().open(self._events.put)
        threading.Thread(target=self._run, args=(endpoint.url,), name="program", daemon=True).start()
        event = self._await()
        if isinstance(event, ProgramResult):
            self.close()
            raise ProgramError(f"the program ended (reward {event.reward:g}) without asking the policy anything")
        self._system = _opening(event.messages)
        shown = self._show(event, len(self._system))
        shown.system = "\n\n".join(message.text for message in self._system)
        return shown

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What the program asks next; at its end its reward.

        Raises:
            ProgramError: It failed, or its next request does not continue the conversation.
            EnvironmentTimeoutError: It neither asked nor ended in time.
        """
        assert self._request is not None, "step comes after reset"
        said = (*self._request.messages, ChatMessage("assistant", action))
        self._request.answer(action)
        event = self._await()
        if isinstance(event, ProgramResult):
            self.success = event.success
            self.close()
            return Observation(""), float(event.reward), True
        if self.history == "append":
            self._check_continues(said, event.messages)
            return self._show(event, len(said)), 0.0, False
        # Another system prompt than the episode's is shown: another agent of the program speaks.
        is_same = _opening(event.messages) == self._system
        return self._show(event, len(self._system) if is_same else 0), 0.0, False

    @property
    def anchor(self) -> Hashable:
        """The conversation so far: what else the program knows cannot be asked for."""
        return self._conversation

    def close(self) -> None:
        """Refuse what the program asks from now on. May be called again, and from any thread."""
        if self._endpoint is not None:
            self._endpoint.close()
        self._events.put(None)

    def _run(self, base_url: str) -> None:
        try:
            result = self.program(base_url)
            if not isinstance(result, ProgramResult) or not math.isfinite(result.reward):
                raise ValueError(f"a program gives a ProgramResult with a finite reward, not {result!r}")
            self._events.put(result)
        except BaseException as error:  # SystemExit too: a program must not end unseen
            self._events.put(error)

    def _await(self) -> ChatRequest | ProgramResult:
        try:
            event = self._events.get(timeout=self.seconds)
        except Empty:
            self.close()  # nobody else does: an episode that missed a deadline is not touched again
            raise EnvironmentTimeoutError(
                f"the program neither asked nor ended within {self.seconds:g} s", self.seconds
            ) from None
        if event is None:
            raise ProgramError("the episode was closed")
        if isinstance(event, BaseException):
            refusal = self._endpoint.refusal if self._endpoint else ""
            self.close()
            hint = f" (a request of it was refused: {refusal})" if refusal else ""
            raise ProgramError(f"the program failed: {type(event).__name__}: {event}{hint}") from event
        return event

    def _show(self, request: ChatRequest, known: int) -> Observation:
        """The messages from number `known` on."""
        self._request, self._conversation = request, request.messages
        new = request.messages[known:]
        if self.history == "whole" or any(message.role == "assistant" for message in new):
            text = "\n\n".join(f"{message.role.capitalize()}: {message.text}" for message in new)
        else:
            text = "\n\n".join(message.text for message in new)
        return Observation(text)

    def _check_continues(self, said: Sequence[ChatMessage], asked: Sequence[ChatMessage]) -> None:
        """Refuse a request that does not begin with what was said before."""
        pairs = zip(said, asked, strict=False)
        wrong = next((number for number, (old, new) in enumerate(pairs) if not old.agrees_with(new)), None)
        if wrong is None and len(asked) > len(said):
            return
        what = f"it has {len(asked)} messages after {len(said)} were said"
        if wrong is not None:
            old, new = said[wrong], asked[wrong]
            what = f"message {wrong + 1} is {new.role} {new.text[:80]!r}, and {old.role} {old.text[:80]!r} was said"
        self.close()
        raise ProgramError(
            f"the program's request does not continue the conversation: {what}. A program that rewrites its history, "
            "or holds several conversations, needs history: whole and data.chat: rebuild; one that asks again after a "
            "time limit of its own needs that limit off."
        )


def check_program_options(history: str, seconds: float) -> None:
    """Refuse options that are out of range.

    Raises:
        UserError: They are.
    """
    if history not in ("append", "whole"):
        raise UserError(f"history={history!r} is unknown; allowed are append, whole.")
    if not seconds > 0:
        raise UserError(f"seconds={seconds}: wait a positive time.")


def _opening(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    """The system messages that come first; none where there is nothing else, as then they are the question."""
    first = list(takewhile(lambda message: message.role == "system", messages))
    return first if len(first) < len(messages) else []
