"""From what vLLM says to actions that end as `HFEngine`'s do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lit_agentrl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Collection

    from lit_agentrl.rollouts.stop_strings import StopStrings


@dataclass(frozen=True)
class Request:
    """A context to be continued."""

    context: list[int]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back for one."""

    token_ids: list[int]
    logprobs: list[float]
    finish: str
    """As vLLM calls it: "stop" or "length"."""
    num_cached: int = 0


class MalformedAnswerError(Exception):
    """An answer that cannot be what was asked for; the text says why."""


@dataclass(frozen=True)
class Rules:
    """What an action may hold, and what ends it."""

    stop_ids: Collection[int]
    stop_strings: StopStrings | None
    vocab_size: int

    def check(self, request: Request, answer: Answer) -> None:
        """Refuse an answer that cannot be one to `request`.

        Raises:
            MalformedAnswerError: Too few or too many tokens, tokens or log-probabilities that are none.
        """
        tokens, asked = answer.token_ids, request.max_tokens
        if not 1 <= len(tokens) <= asked:
            raise MalformedAnswerError(f"{len(tokens)} tokens came where 1 to {asked} were asked for")
        if len(answer.logprobs) != len(tokens):
            raise MalformedAnswerError(f"{len(answer.logprobs)} log-probabilities came for {len(tokens)} tokens")
        if not all(0 <= token < self.vocab_size for token in tokens):
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise MalformedAnswerError(f"token {wrong} came, and the model has {self.vocab_size}")
        if not all(logprob <= 1e-3 for logprob in answer.logprobs):  # NaN is not
            wrong_value = next(logprob for logprob in answer.logprobs if not logprob <= 1e-3)
            raise MalformedAnswerError(f"a log-probability of {wrong_value} came")
        if answer.finish not in ("stop", "length"):
            raise MalformedAnswerError(f"it ended with {answer.finish!r}, not with 'stop' or 'length'")
        if answer.finish == "length" and len(tokens) < asked:
            raise MalformedAnswerError(f"{len(tokens)} tokens came where {asked} were asked for and nothing stopped it")
        if answer.finish == "stop" and self.stop_strings is None and tokens[-1] not in self.stop_ids:
            raise MalformedAnswerError(f"it stopped after {len(tokens)} tokens, the last of which ends no action")


@dataclass
class Action:
    """An action while it grows, token by token as `HFEngine` sees it."""

    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_cached: int = 0
    has_stopped: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether it has ended."""
        return self.has_stopped or len(self.token_ids) == self.max_tokens

    def extend(self, answer: Answer, rules: Rules) -> None:
        """Take over an answer's tokens up to the one that ends the action.

        An answer whose text vLLM took for a stop string's, and `StopStrings` does not, leaves the action incomplete:
        its rest has to be asked for.
        """
        if not self.token_ids:
            self.num_cached = answer.num_cached
        for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            in_text = rules.stop_strings is not None and rules.stop_strings.is_complete(self.token_ids)
            self.has_stopped = token in rules.stop_ids or in_text
            if self.is_complete:
                return

    def completion(self, context: list[int]) -> Completion:
        """The action as engines give it."""
        cached = min(self.num_cached, len(context))
        finish: Literal["stop", "length"] = "stop" if self.has_stopped else "length"
        return Completion(self.token_ids, self.logprobs, finish, cached, len(context) - cached)


def has_nan(answer: Answer) -> bool:
    """Whether the weights gave something else than numbers."""
    return any(math.isnan(logprob) for logprob in answer.logprobs)
