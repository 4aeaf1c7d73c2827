"""Sampled ids are never re-tokenised, and a template that rewrites history is refused by the line that does it."""

import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.types import Observation
from tiny import byte_tokenizer

THINK_STRIPPING = """{%- for message in messages %}
{%- set content = message['content'] %}
{%- if message['role'] == 'assistant' and not loop.last %}
{%- set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def rendered(chat: Chat, messages: list[dict[str, str]]) -> list[int]:
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_tokenizer())


@pytest.mark.parametrize("closed", [True, False])
def test_appended_turns_are_what_the_template_renders(chat, closed):
    """Whether the end of turn was sampled or the action was cut, the context is the template's own."""
    first, second = Observation("Look.", "Be brief."), Observation("A door.")
    action = chat.action_ids("open door")
    action = action if closed else action[:-1]
    context = chat.next_context(chat.opening(first), action, second)
    assert context == rendered(
        chat,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "open door"},
            {"role": "user", "content": "A door."},
        ],
    )


def test_sampled_ids_survive_as_they_were(chat):
    """An action whose ids are not how its text would be tokenised stays as it was sampled."""
    action = [255, 4, 4, 2]
    opening = chat.opening(Observation("Hi"))
    context = chat.next_context(opening, action, Observation("Next"))
    assert context[: len(opening) + len(action)] == opening + action


def test_rebuild_renders_every_step_anew(chat):
    rebuilt = Chat(chat.tokenizer, "rebuild")
    assert rebuilt.next_context([1, 2, 3], [4], Observation("Now")) == rebuilt.opening(Observation("Now"))


def test_a_rebuilt_prompt_keeps_the_episode_s_system_prompt(chat):
    """The first observation states it; the rollout carries it to the later ones."""
    import test_chain

    engine = test_chain.Script()
    test_chain.roll(["task2"], engine, group_size=1, max_steps=3, mode="rebuild")
    texts = [chat.tokenizer.decode(contexts[0]) for contexts in engine.contexts]
    assert len(texts) == 2
    assert all("Say yes." in text for text in texts)
    assert "2 left" not in texts[1]


def test_a_template_that_rewrites_history_is_refused_and_its_line_named(chat):
    """The message shows the guilty line, by number and text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINK_STRIPPING
    with pytest.raises(UserError, match=r"Line 4 of the template does it: .*split\('</think>'\)"):
        Chat(tokenizer)
    assert Chat(tokenizer, "rebuild").opening(Observation("x"))


def test_a_tokenizer_without_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Chat(tokenizer)


def test_decode_gives_the_text_alone(chat):
    assert chat.decode(chat.action_ids(" go east ")) == "go east"
