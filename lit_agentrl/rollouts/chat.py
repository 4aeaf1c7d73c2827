"""Token-in/token-out chat: the ids that were sampled are the ids that are trained, turn after turn.

A conversation is a list of token ids that only ever grows: the first prompt is rendered by the chat template, every
later turn appends the template's *delta* (end of the answer, the next user message, the next generation prompt), or,
where the whole episode is one answer, the observation's bare text.
Nothing that the policy saw or said is ever rendered or tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.template_check import rewriting_line
from lit_agentrl.types import Observation

Message = dict[str, str]
ChatMode = Literal["append", "rebuild", "inline"]
"""How later turns are made."""

_PROBE_TURNS = ("First question.", "Second question.", "Third question.")
_PROBE_ANSWERS = ("<think>\nPlan A.\n</think>\n\nFirst answer.", "<think>\nPlan B.\n</think>\n\nSecond answer.")


class Chat:
    """Renders an episode's turns into token ids through the tokenizer's chat template.

    `append` keeps the whole episode in the context. `rebuild` renders every step's observation as a fresh prompt
    (for methods whose prompt is rewritten at each step, as GiGPO's); any template is fit for that.

    `inline` makes the whole episode one answer: a later observation's text is appended as it is, in the midst of the
    answer that a stop string interrupted (Search-R1, Tree-GRPO). An answer that the policy closed by itself, with the
    end of turn, cannot go on: there the next observation is a user turn, appended as in `append`. It may be appended
    to any template's opening, as nothing is rendered again: where the template would strip the thoughts of the closed
    answer from its history, they stay.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        mode: How later turns are made.

    Raises:
        UserError: The mode is unknown, the tokenizer has no chat template, the template does not show a user message
            after an answer, or (mode `append`) it rewrites earlier turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: ChatMode = "append") -> None:
        if mode not in get_args(ChatMode):
            raise UserError(f"chat mode {mode!r} is unknown; allowed are {', '.join(map(repr, get_args(ChatMode)))}.")
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template. Use an instruction-tuned model, or "
                "set `chat_template` in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.mode = mode
        if mode == "append":
            _check_prefix_preserving(tokenizer)
        self._before, self._after = _delta_frame(tokenizer)

    def opening(self, observation: Observation) -> list[int]:
        """The token ids of an episode's first prompt, generation prompt included."""
        return self._encode(_render(self.tokenizer, _messages(observation)))

    def next_context(self, context_ids: Sequence[int], action_ids: list[int], observation: Observation) -> list[int]:
        """Everything the policy sees at the next step: the old context, its own tokens, then the new observation."""
        if self.mode == "rebuild":
            return self.opening(observation)
        goes_on = self.mode == "inline" and not self._is_closed(action_ids)
        later = self._encode(observation.text) if goes_on else self.delta(action_ids, observation.text)
        return [*context_ids, *action_ids, *later]

    def delta(self, action_ids: list[int], text: str) -> list[int]:
        """The ids between an action and the next one: end of turn (unless it was sampled), user turn, answer prefix."""
        ids = self._encode(self._before + text + self._after)
        return ids[1:] if action_ids and ids and action_ids[-1] == ids[0] else ids

    def end_of_turn_id(self) -> int:
        """The token with which the template closes an answer."""
        return self._encode(self._before)[0]

    def action_ids(self, text: str) -> list[int]:
        """The ids of an answer as the policy would have sampled it (supervised examples).

        The closing token is included, but not in mode `inline`: there a stop string ends every answer, the last one of
        an episode too, and the closing token is never sampled after it.
        """
        return self._encode(text) if self.mode == "inline" else [*self._encode(text), self.end_of_turn_id()]

    def decode(self, ids: list[int]) -> str:
        """The text of sampled ids without special tokens, surrounding white space removed."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _is_closed(self, action_ids: list[int]) -> bool:
        """Whether the policy ended its answer by itself: with the end of turn, or the end of the text."""
        return bool(action_ids) and action_ids[-1] in (self.end_of_turn_id(), self.tokenizer.eos_token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _messages(observation: Observation) -> list[Message]:
    system = [{"role": "system", "content": observation.system}] if observation.system else []
    return [*system, {"role": "user", "content": observation.text}]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _history(num_answers: int) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": _PROBE_TURNS[0]}]
    for answer, turn in zip(_PROBE_ANSWERS[:num_answers], _PROBE_TURNS[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages


def _delta_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the template puts before and after a later user message, read off a plain two-turn conversation."""
    messages: list[Message] = [
        {"role": "user", "content": _PROBE_TURNS[0]},
        {"role": "assistant", "content": "ANSWER-PROBE"},
        {"role": "user", "content": "TURN-PROBE"},
    ]
    tail = _render(tokenizer, messages).split("ANSWER-PROBE")[-1]
    before, found, after = tail.partition("TURN-PROBE")
    if not found or not before:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path!r} does not show a user message after an answer, so later "
            "turns cannot be appended. Use a template for multi-turn chat."
        )
    return before, after


def _check_prefix_preserving(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that renders earlier turns differently once later ones follow."""
    for num_answers in (1, 2):
        seen = _render(tokenizer, _history(num_answers - 1)) + _PROBE_ANSWERS[num_answers - 1]
        later = _render(tokenizer, _history(num_answers))
        if later.startswith(seen):
            continue
        at = next((i for i, (a, b) in enumerate(zip(seen, later, strict=False)) if a != b), min(len(seen), len(later)))
        line = rewriting_line(str(tokenizer.chat_template), _history(num_answers - 1), _history(num_answers))
        raise UserError(
            f"The chat template of {tokenizer.name_or_path!r} rewrites earlier turns: after turn {num_answers} the "
            f"policy had seen ...{_around(seen, at)!r}, the template then shows ...{_around(later, at)!r}. {line} "
            "Sampled tokens would not be the tokens that are trained. Remove that line from the template (the "
            "tokenizer's `chat_template`), or use chat mode `rebuild`, which renders every step anew."
        )


def _around(text: str, place: int) -> str:
    return text[max(0, place - 20) : place + 30]
