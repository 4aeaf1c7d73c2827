"""A chat template under one interface, whether it wants a turn as a string or as a list of images and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_agentrl.errors import UserError

if TYPE_CHECKING:
    from lit_agentrl.images import ImageReader, Picture

Message = dict[str, Any]

_PROBE = "TURN-PROBE"


class Template:
    """Renders messages, with placeholders for their images and with what stands for those.

    Templates of text models take strings; those of vision-language models take lists, some of them nothing else. Which
    it is, is tried out. To a template that takes strings only, images are written as placeholders on lines of their
    own before the text.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        reader: What reads images for the model; None for a model of text.

    Raises:
        UserError: The template shows no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reader: ImageReader | None = None) -> None:
        self.tokenizer = tokenizer
        self.placeholder = "" if reader is None else reader.placeholder
        self.reserved: tuple[str, ...] = ()
        """Texts that only an image may be written as."""
        if reader is not None:
            feature = str(tokenizer.convert_ids_to_tokens(reader.image_token_id))
            self.reserved = tuple(dict.fromkeys((reader.placeholder, feature)))
        self.takes_lists = self._find_format()
        self._frames: dict[int, tuple[str, str]] = {}

    def message(self, role: str, text: str, num_images: int = 0) -> Message:
        """One turn, its images before its text."""
        if self.takes_lists:
            images = [{"type": "image"}] * num_images
            return {"role": role, "content": [*images, {"type": "text", "text": text}]}
        return {"role": role, "content": f"{self.placeholder}\n" * num_images + text}

    def render(self, messages: list[Message]) -> str:
        """The conversation as text, generation prompt included."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def frame(self, num_images: int = 0) -> tuple[str, str]:
        """What stands before and after the text of a later user message with so many images.

        Read off a plain two-turn conversation, so that the end of the answer before is part of it.

        Raises:
            UserError: The template does not show a user message after an answer.
        """
        if num_images not in self._frames:
            turns = [self.message("user", "Question."), self.message("assistant", "ANSWER-PROBE")]
            text = self.render([*turns, self.message("user", _PROBE, num_images)])
            before, found, after = text.split("ANSWER-PROBE")[-1].partition(_PROBE)
            if not found or not before:
                raise UserError(
                    f"The chat template of {self.tokenizer.name_or_path!r} does not show a user message after an "
                    "answer, so later turns cannot be appended. Use a template for multi-turn chat."
                )
            self._frames[num_images] = before, after
        return self._frames[num_images]

    def gap(self) -> str:
        """The white space with which an answer begins after the generation prompt; SmolVLM's is `Assistant:`, say."""
        turns = [self.message("user", "Question.")]
        prompt = self.render(turns)
        later = self.render([*turns, self.message("assistant", "ANSWER-PROBE"), self.message("user", _PROBE)])
        between = later.removeprefix(prompt).partition("ANSWER-PROBE")[0]
        return between if later.startswith(prompt) and between.isspace() else ""

    def image_within_text(self) -> str:
        """What the template writes for an image in the midst of a message; a bare placeholder where it moves images."""
        if not self.takes_lists:
            return f"{self.placeholder}\n"
        parts = [{"type": "text", "text": "BEFORE-PROBE"}, {"type": "image"}, {"type": "text", "text": "AFTER-PROBE"}]
        text = self.render([{"role": "user", "content": parts}])
        mark = text.partition("BEFORE-PROBE")[2].partition("AFTER-PROBE")[0]
        return mark if mark.count(self.placeholder) == 1 else self.placeholder

    def harmless(self, text: str) -> str:
        """The text with a space put into whatever would read as an image (`<image>` becomes `< image>`).

        What an environment shows, and what a tool finds, is not the user's own: written out, a placeholder there would
        take the place of an image.
        """
        for token in self.reserved:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def with_pictures(self, text: str, pictures: Sequence[Picture]) -> str:
        """Rendered text with each placeholder replaced by what stands for its image.

        Raises:
            UserError: The template did not write one placeholder an image.
        """
        if not self.placeholder:
            return text
        parts = text.split(self.placeholder)
        if len(parts) - 1 != len(pictures):
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path!r} wrote {len(parts) - 1} placeholders "
                f"({self.placeholder}) for {len(pictures)} images. Use the template of the model's own processor."
            )
        return parts[0] + "".join(picture.text + part for picture, part in zip(pictures, parts[1:], strict=True))

    def _find_format(self) -> bool:
        """Whether content is given as lists: what the model's processor does, where it has one; else if need be."""
        num_images = int(bool(self.placeholder))
        for takes_lists in (True, False) if num_images else (False, True):
            self.takes_lists = takes_lists
            try:
                text = self.render([self.message("user", _PROBE, num_images)])
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
                continue
            shows_images = not num_images or text.count(self.placeholder) == 1
            if text.count(_PROBE) == 1 and shows_images and "'type'" not in text:
                return takes_lists
        raise UserError(
            f"The chat template of {self.tokenizer.name_or_path!r} shows neither content that is a string nor content "
            "that is a list of images and text. Use the template of the model's own processor."
        )
