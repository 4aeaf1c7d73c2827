"""Lessons as token ids, exactly as rollouts write them: a prompt is tokenised alone, and answers follow it.

Legend: L tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_agentrl.vlm.template import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_agentrl.vlm.lessons import Lesson


@dataclass(frozen=True)
class Sequence:
    """A conversation about one image."""

    ids: list[int]
    """[L]; the placeholder stands once for every patch."""
    is_answer: list[bool]
    """[L], what is learnt: the answers and the token that ends each."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, question: str, system: str | None, num_patches: int, has_image: bool = True
) -> list[int]:
    """A conversation's opening up to where the model answers."""
    parts = [{"type": "image"}] * has_image + [{"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return _ids(tokenizer, text.replace(IMAGE, IMAGE * num_patches))


def lesson_sequence(tokenizer: PreTrainedTokenizerBase, lesson: Lesson, num_patches: int) -> Sequence:
    """A lesson from its system prompt to the end of its last answer."""
    (question, answer), *more = lesson.turns
    pieces = [(prompt_ids(tokenizer, question, lesson.system, num_patches), False), (_reply(tokenizer, answer), True)]
    opening = _between(tokenizer)
    for question, answer in more:
        text = opening.replace(_MARK, question)
        pieces += [(_ids(tokenizer, text), False), (_reply(tokenizer, answer), True)]
    ids = [token for piece, _ in pieces for token in piece]
    return Sequence(ids, [is_answer for piece, is_answer in pieces for _ in piece])


_MARK = "QUESTION"


def _between(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between the end token of an answer and the next answer, as the template writes it."""
    turn = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": _MARK}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text.rpartition(f"B{tokenizer.eos_token}")[2]


def _reply(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    assert isinstance(tokenizer.eos_token_id, int)
    return [*_ids(tokenizer, answer), tokenizer.eos_token_id]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return ids
