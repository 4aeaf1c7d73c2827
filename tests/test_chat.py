"""Sampled ids are never re-tokenised, and a template that rewrites history is refused by the line that does it."""

import pytest

from lit_agentrl.datamodules import ConversationDataModule, Walkthroughs
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rows import Row, trajectory_rows
from lit_agentrl.types import Completion, Conversation, Observation, SamplingParams, WalkthroughSuite
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


def test_an_unknown_mode_is_refused_with_all_that_are_known(chat):
    with pytest.raises(UserError, match="'inlined' is unknown; allowed are 'append', 'rebuild', 'inline'"):
        Chat(chat.tokenizer, "inlined")


# --- inline -----------------------------------------------------------------------------------------------------------

ANSWERS = (
    "<think>Who wrote it?</think><search>author of Emma</search>",
    "<think>Born when?</think><search>Jane Austen</search>",
    "<think>Known.</think><answer>1775</answer>",
)
FOUND = ("\n\n<information>Jane Austen</information>\n\n", "\n\n<information>1775-1817</information>\n\n")


class Library(WalkthroughSuite):
    """One question, two look-ups."""

    stop_strings = ("</search>", "</answer>")

    def tasks(self, split):
        return ["emma"]

    def make(self, task):
        return Reader()

    def walkthrough(self, task) -> Conversation:
        shown = (Observation("When was the author of Emma born?", "Search."), *map(Observation, FOUND))
        return list(zip(shown, ANSWERS, strict=True))


class Reader:
    """Shows what the walkthrough shows, whatever is asked."""

    anchor, success = None, None

    def __init__(self) -> None:
        self.actions: list[str] = []

    def reset(self) -> Observation:
        return Library().walkthrough("emma")[0][0]

    def step(self, action: str) -> tuple[Observation, float, bool]:
        self.actions.append(action)
        done = len(self.actions) == 3
        return Observation("" if done else FOUND[len(self.actions) - 1]), 0.0, done

    def close(self) -> None: ...


class Recital:
    """Gives the answers in turn, each ended as it was told."""

    def __init__(self, *ends: str) -> None:
        self.answers = [answer + end for answer, end in zip(ANSWERS, ends or ("", "", ""), strict=True)]

    def generate(self, contexts, params, seeds=None):
        ids = byte_tokenizer().encode(self.answers.pop(0), add_special_tokens=False)
        return [Completion(ids, [-0.5] * len(ids), "stop") for _ in contexts]

    def sync(self, policy) -> None: ...


def recited(chat: Chat, *ends: str) -> list[Row]:
    """The rows of the episode in which the answers are given."""
    context = RolloutContext(
        Recital(*ends), chat, EnvironmentPool(1, 5.0), Library().make, SamplingParams(max_new_tokens=80), 480
    )
    (group,) = ChainRollout(max_steps=3).collect([Prompt("emma", 0)], 1, context)
    assert len(group.trajectories[0].steps) == 3
    assert [step.action for step in group.trajectories[0].steps] == list(ANSWERS)
    return trajectory_rows(group.trajectories[0], [0.0] * 3)


def test_an_inline_episode_is_one_answer():
    """The template opens it; then thoughts, calls and what was found follow one another, and only the first are
    trained."""
    chat = Chat(byte_tokenizer(), "inline")
    (row,) = recited(chat)
    opening = chat.opening(Library().walkthrough("emma")[0][0])
    assert row.token_ids[: len(opening)] == opening
    answer = chat.tokenizer.decode(row.token_ids[len(opening) :])
    assert answer == ANSWERS[0] + FOUND[0] + ANSWERS[1] + FOUND[1] + ANSWERS[2]
    trained = [token for token, mask in zip(row.token_ids, row.action_mask, strict=True) if mask]
    assert chat.tokenizer.decode(trained) == "".join(ANSWERS)


def test_a_warm_up_is_the_rollout_token_by_token(tiny_lm):
    """Supervised rows have the tokens of the episode, and the same ones are trained: in every mode of one row."""
    for mode, end in (("inline", ""), ("append", "<|im_end|>")):
        data = ConversationDataModule(Walkthroughs(Library()), tiny_lm, chat=mode, max_length=480)
        data.setup("fit")
        ((supervised,),) = data.rows
        (played,) = recited(Chat(byte_tokenizer(), mode), end, end, end)
        assert supervised.token_ids == played.token_ids
        assert supervised.action_mask == played.action_mask


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_that_the_policy_closed_is_followed_by_a_user_turn(eos):
    """The closing token was sampled and stays; from there on the context is that of `append`."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = eos  # a base model's own end of text, beside the template's end of turn
    inline, append = Chat(tokenizer, "inline"), Chat(tokenizer)
    opening = inline.opening(Observation("Look.", "Be brief."))
    closing = tokenizer.convert_tokens_to_ids(["<|im_end|>", eos])
    for last in closing:
        action = [*tokenizer.encode("a door"), last]
        later = inline.next_context(opening, action, Observation("It opens."))
        assert later == append.next_context(opening, action, Observation("It opens."))
        assert later[: len(opening) + len(action)] == opening + action
    action = [*closing, *tokenizer.encode("a door")]  # what lies further back closes nothing
    assert inline.next_context(opening, action, Observation(" opens.")) == [
        *opening,
        *action,
        *tokenizer.encode(" opens."),
    ]


def test_a_template_that_rewrites_history_is_fit_for_inline():
    """Nothing is rendered again: thoughts stay where the policy wrote them, also before a user turn."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINK_STRIPPING
    chat = Chat(tokenizer, "inline")
    opening = chat.opening(Observation("Look."))
    assert opening == rendered(chat, [{"role": "user", "content": "Look."}])
    action = tokenizer.encode("<think>Hm.</think>door<|im_end|>")
    text = tokenizer.decode(chat.next_context(opening, action, Observation("Open.")))
    assert text == (
        "<|im_start|>user\nLook.<|im_end|>\n<|im_start|>assistant\n<think>Hm.</think>door<|im_end|>\n"
        "<|im_start|>user\nOpen.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_later_user_turns_is_refused():
    """Where the policy closes its answer there would be no way on."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(UserError, match="does not show a user message after an answer"):
        Chat(tokenizer, "inline")
