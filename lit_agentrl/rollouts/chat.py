"""Token-in/token-out chat: the ids that were sampled are the ids that are trained, turn after turn.

A conversation is a list of token ids that only ever grows: the first prompt is rendered by the chat template, every
later turn appends the template's *delta* (end of the answer, the next user message, the next generation prompt), or,
where the whole episode is one answer, the observation's bare text.
Nothing that the policy saw or said is ever rendered or tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from transformers import PreTrainedTokenizerBase

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.template import Message, Template
from lit_agentrl.rollouts.template_check import rewriting_line
from lit_agentrl.types import Observation

if TYPE_CHECKING:
    from lit_agentrl.images import Image, ImageReader, Picture

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

    Images of an observation stand before its text, each as the tokens that the model's own processor writes for it. An
    observation's text is not trusted: where it spells a placeholder for an image, a space is put into it (`<image>`
    becomes `< image>`), in system prompts and supervised answers too, so that no image can be shown by writing its
    token.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        mode: How later turns are made.
        reader: What reads images for the model; None for a model of text, which refuses observations with images.

    Raises:
        UserError: The mode is unknown, the tokenizer has no chat template, the template does not show a user message
            after an answer, or (mode `append`) it rewrites earlier turns.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mode: ChatMode = "append", reader: ImageReader | None = None
    ) -> None:
        if mode not in get_args(ChatMode):
            raise UserError(f"chat mode {mode!r} is unknown; allowed are {', '.join(map(repr, get_args(ChatMode)))}.")
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template. Use an instruction-tuned model, or "
                "set `chat_template` in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.mode = mode
        self.reader = reader
        self.template = Template(tokenizer, reader)
        if mode == "append":
            _check_prefix_preserving(self.template)
        self._end_of_turn = self._encode(self.template.frame()[0])[0]
        self._gap = "" if mode == "inline" else self.template.gap()  # there answers go on, most begin none

    def opening(self, observation: Observation) -> list[int]:
        """The token ids of an episode's first prompt, generation prompt included.

        Raises:
            UserError: The observation has images, which the model does not take.
            ImageError: One of them cannot be read.
        """
        template, pictures = self.template, self._pictures(observation.images)
        system = [template.message("system", template.harmless(observation.system))] if observation.system else []
        user = template.message("user", template.harmless(observation.text), len(pictures))
        return self._encode(template.with_pictures(template.render([*system, user]), pictures))

    def next_context(self, context_ids: Sequence[int], action_ids: list[int], observation: Observation) -> list[int]:
        """Everything the policy sees at the next step: the old context, its own tokens, then the new observation.

        Raises:
            UserError: The observation has images, which the model does not take.
            ImageError: One of them cannot be read.
        """
        if self.mode == "rebuild":
            return self.opening(observation)
        goes_on = self.mode == "inline" and not self._is_closed(action_ids)
        text, images = observation.text, observation.images
        later = self._within_answer(text, images) if goes_on else self.delta(action_ids, text, images)
        return [*context_ids, *action_ids, *later]

    def delta(self, action_ids: list[int], text: str, images: Sequence[Image] = ()) -> list[int]:
        """The ids between an action and the next one: end of turn (unless it was sampled), user turn, answer prefix."""
        pictures = self._pictures(images)
        before, after = self.template.frame(len(pictures))
        ids = self._encode(self.template.with_pictures(before + self.template.harmless(text) + after, pictures))
        return ids[1:] if action_ids and ids and action_ids[-1] == ids[0] else ids

    def end_of_turn_id(self) -> int:
        """The token with which the template closes an answer."""
        return self._end_of_turn

    def action_ids(self, text: str) -> list[int]:
        """The ids of an answer as the policy would have sampled it (supervised examples).

        The closing token is included, but not in mode `inline`: there a stop string ends every answer, the last one of
        an episode too, and the closing token is never sampled after it.
        """
        ids = self._encode(self._gap + self.template.harmless(text))
        return ids if self.mode == "inline" else [*ids, self.end_of_turn_id()]

    def decode(self, ids: list[int]) -> str:
        """The text of sampled ids without special tokens, surrounding white space removed."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _within_answer(self, text: str, images: Sequence[Image]) -> list[int]:
        """An observation in the midst of an answer."""
        pictures = self._pictures(images)
        marks = self.template.image_within_text() * len(pictures) if pictures else ""
        return self._encode(self.template.with_pictures(marks + self.template.harmless(text), pictures))

    def _pictures(self, images: Sequence[Image]) -> list[Picture]:
        if not images:
            return []
        if self.reader is None:
            raise UserError(
                f"The environment shows {len(images)} image(s), but {self.tokenizer.name_or_path!r} is used as a model "
                "of text. Choose a vision-language model whose images are supported (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, "
                "SmolVLM, Idefics3, LLaVA, Gemma 3), or have the environment describe its state in words."
            )
        return [self.reader.read(image) for image in images]

    def _is_closed(self, action_ids: list[int]) -> bool:
        """Whether the policy ended its answer by itself: with the end of turn, or the end of the text."""
        return bool(action_ids) and action_ids[-1] in (self.end_of_turn_id(), self.tokenizer.eos_token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _history(template: Template, num_answers: int) -> list[Message]:
    messages = [template.message("user", _PROBE_TURNS[0])]
    for answer, turn in zip(_PROBE_ANSWERS[:num_answers], _PROBE_TURNS[1:], strict=False):
        messages += [template.message("assistant", answer), template.message("user", turn)]
    return messages


def _check_prefix_preserving(template: Template) -> None:
    """Refuse a template that renders earlier turns differently once later ones follow."""
    gap = template.gap()
    for num_answers in (1, 2):
        seen = template.render(_history(template, num_answers - 1)) + gap + _PROBE_ANSWERS[num_answers - 1]
        later = template.render(_history(template, num_answers))
        if later.startswith(seen):
            continue
        at = next((i for i, (a, b) in enumerate(zip(seen, later, strict=False)) if a != b), min(len(seen), len(later)))
        histories = _history(template, num_answers - 1), _history(template, num_answers)
        line = rewriting_line(str(template.tokenizer.chat_template), *histories)
        raise UserError(
            f"The chat template of {template.tokenizer.name_or_path!r} rewrites earlier turns: after turn "
            f"{num_answers} the policy had seen ...{_around(seen, at)!r}, the template then shows "
            f"...{_around(later, at)!r}. {line} Sampled tokens would not be the tokens that are trained. Remove that "
            "line from the template (the tokenizer's `chat_template`), or use chat mode `rebuild`, which renders every "
            "step anew."
        )


def _around(text: str, place: int) -> str:
    return text[max(0, place - 20) : place + 30]
