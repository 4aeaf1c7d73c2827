"""Observations with images in every chat mode and template, and texts that pretend to be images."""

from __future__ import annotations

import numpy as np
import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image, Picture
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.types import Observation
from tiny import byte_tokenizer
from vlm_folders import CHATML, FAMILIES, vlm_tokenizer

STRINGS = (  # as of a text model: content is a string
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def image(tokens: int) -> np.ndarray:
    """An image that costs so many tokens."""
    return np.zeros((1, tokens, 3), np.uint8)


class Reader:
    """Writes `<image>` once for every column of an image, between brackets."""

    placeholder = "<image>"

    def __init__(self) -> None:
        self.image_token_id = vlm_tokenizer("llava").convert_tokens_to_ids("<image>")

    def read(self, image: Image) -> Picture:
        assert isinstance(image, np.ndarray)
        return Picture(0, f"[{'<image>' * image.shape[1]}]", {})

    def inputs(self, images, token_ids, lengths):
        raise AssertionError("not asked for by a chat")


def chat_of(template: str, mode: str = "append") -> Chat:
    tokenizer = vlm_tokenizer("llava")
    tokenizer.chat_template = template
    return Chat(tokenizer, mode, Reader())


def text_of(chat: Chat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids)


LISTS = CHATML.replace("IMAGE", "'<image>'")
ONLY_LISTS = LISTS.replace("message['content'] is string", "false")
BOTH = {"lists": (ONLY_LISTS, ""), "either": (LISTS, ""), "strings": (STRINGS, "\n")}


@pytest.mark.parametrize("kind", BOTH)
def test_templates_of_lists_and_of_strings(kind):
    """Images stand before the text in the first turn and in later ones, in the order of the observation."""
    template, gap = BOTH[kind]
    chat = chat_of(template)
    context = chat.opening(Observation("Compare.", "Be brief.", images=(image(2), image(1))))
    context = chat.next_context(context, chat.action_ids("same"), Observation("And this?", images=(image(3),)))
    context = chat.next_context(context, chat.action_ids("no"), Observation("Why?"))
    assert text_of(chat, context) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n[<image><image>]{gap}[<image>]{gap}Compare.<|im_end|>\n<|im_start|>assistant\nsame<|im_end|>\n"
        f"<|im_start|>user\n[<image><image><image>]{gap}And this?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert context.count(chat.reader.image_token_id) == 6


def test_a_template_of_lists_serves_a_chat_of_text():
    """Without a reader too: its text would be lost as a string, character by character."""
    tokenizer = vlm_tokenizer("smolvlm")
    text = tokenizer.decode(Chat(tokenizer).opening(Observation("Hello.")))
    assert text == "<|im_start|>User: Hello.<end_of_utterance>\nAssistant:"


def test_rebuilt_prompts_show_the_images_of_their_step_alone():
    chat = chat_of(LISTS, "rebuild")
    context = chat.opening(Observation("First.", images=(image(5),)))
    later = Observation("Second.", images=(image(2),))
    assert chat.next_context(context, [1, 2], later) == chat.opening(later)
    assert chat.opening(later).count(chat.reader.image_token_id) == 2


@pytest.mark.parametrize(
    ("template", "mark"), [(LISTS.replace("'<image>'", "'(<image>)'"), "([{}])"), (STRINGS, "[{}]\n")]
)
def test_images_within_an_answer(template, mark):
    """Written as within a user message: with what the template puts around an image."""
    chat = chat_of(template, "inline")
    opening = chat.opening(Observation("Find it."))
    action = chat.action_ids("<zoom>left</zoom>")
    context = chat.next_context(opening, action, Observation("\nHere.", images=(image(2), image(1))))
    later = text_of(chat, context[len(opening) + len(action) :])
    assert later == mark.format("<image><image>") + mark.format("<image>") + "\nHere."
    closed = chat.next_context(opening, [*action, chat.end_of_turn_id()], Observation("Here.", images=(image(2),)))
    assert "<|im_start|>user\n" in text_of(chat, closed[len(opening) :])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["append", "rebuild", "inline"])
def test_a_written_placeholder_is_no_image(name, mode):
    """In the task, the system prompt, a later turn and a supervised answer."""
    import test_image_reader

    reader = test_image_reader.reader_of(name)
    chat = Chat(vlm_tokenizer(name), mode, reader)
    feature = chat.tokenizer.convert_ids_to_tokens(reader.image_token_id)
    lie = f"a{reader.placeholder}b{feature}{feature}c<{reader.placeholder}>"
    context = chat.opening(Observation(lie, lie))
    context = chat.next_context(context, chat.action_ids(lie), Observation(lie))
    assert reader.image_token_id not in context
    shown = Observation(lie, lie, images=(np.zeros((16, 16, 3), np.uint8),))
    for ids in (chat.opening(shown), chat.delta([], lie, shown.images)):
        assert ids.count(reader.image_token_id) == reader.read(shown.images[0]).text.count(feature)
    assert f"a{feature[0]} {feature[1:]}b" in text_of(chat, chat.action_ids(f"a{feature}b"))


def test_text_that_spells_no_placeholder_is_left_alone():
    chat = chat_of(LISTS)
    text = "<img> <image <|image|> </image>"
    assert text_of(chat, chat.action_ids(text)) == text + "<|im_end|>"


@pytest.mark.parametrize("mode", ["append", "rebuild", "inline"])
def test_a_text_model_refuses_images_by_name(mode):
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "small-talker"
    chat = Chat(tokenizer, mode)
    shown = Observation("Look.", images=(image(1), image(2)))
    opening = chat.opening(Observation("Look."))
    for use in (lambda: chat.opening(shown), lambda: chat.next_context(opening, [9], shown)):
        with pytest.raises(UserError, match=r"shows 2 image.*'small-talker' is used as a model of text\. Choose"):
            use()


def test_a_template_that_hides_images_is_not_used_for_them():
    """It knows text parts only: placeholders are written into a string instead."""
    blind = LISTS.replace("part['type'] == 'image'", "false")
    chat = chat_of(blind)
    assert text_of(chat, chat.opening(Observation("Hi", images=(image(2),)))).startswith(
        "<|im_start|>user\n[<image><image>]\nHi"
    )
    with pytest.raises(UserError, match="shows neither content that is a string nor"):
        chat_of("{% for message in messages %}{{ message['role'] }}{% endfor %}")


def test_a_template_that_writes_placeholders_of_its_own_is_refused():
    chat = chat_of(LISTS + "{% if messages[0]['role'] == 'system' %}{{ '<image>' }}{% endif %}")
    with pytest.raises(UserError, match=r"wrote 2 placeholders \(<image>\) for 1 images"):
        chat.opening(Observation("Hi", "Be brief.", images=(image(2),)))
