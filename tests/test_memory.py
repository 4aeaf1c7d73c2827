"""Prompts that are rebuilt at every step: their text, their room, and what becomes of the history that does not fit."""

import pytest

from lit_agentrl.cli import main
from lit_agentrl.datamodules import ConversationDataModule, Walkthroughs
from lit_agentrl.envs import EchoSuite
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.memory import HistoryWindow, Memory, next_prompt
from lit_agentrl.rows import trajectory_rows
from lit_agentrl.types import Completion, Observation, SamplingParams, Step, StopReason
from runs import checkpoint
from tiny import byte_tokenizer

CHAT = Chat(byte_tokenizer(), "rebuild")


def step(state: str, action: str) -> Step:
    return Step([1], [2], [0.0], observation=f"Long text of {state}", state=state, action=action)


STEPS = [step("hall", "<think>up?</think><action>north</action>"), step("attic", "look"), step("attic, dusty", "south")]
HERE = Observation(
    "Task: nap. hall again. Commands: ...", "Be good.", state="hall again", task="nap", actions=("go", "nap")
)


def test_a_window_by_hand():
    """Task, how many steps were taken, the last two with their numbers, the observation, the actions, the closing."""
    text = HistoryWindow(2, closing="Choose.").text(STEPS, HERE, 2)
    assert text == (
        "Task: nap\n\n"
        "Steps taken: 3. The last 2:\n"
        "[Observation 2: 'attic', Action 2: 'look']\n"
        "[Observation 3: 'attic, dusty', Action 3: 'south']\n\n"
        "Observation: hall again\n\n"
        "Actions:\ngo\nnap\n\n"
        "Choose."
    )


def test_the_first_prompt_has_no_history():
    assert HistoryWindow().text([], HERE, 0) == "Task: nap\n\nObservation: hall again\n\nActions:\ngo\nnap"


def test_no_window_still_counts_steps():
    """Length 0: the paper's prompts without history; thoughts are never retold."""
    assert "Steps taken: 3.\n\n" in HistoryWindow(0).text(STEPS, HERE, 0)
    whole = HistoryWindow("all", actions=False).text(STEPS, HERE, 3)
    assert "Action 1: 'north'" in whole
    assert "up?" not in whole
    assert "Actions:" not in whole


def test_an_observation_in_one_piece_is_shown_whole():
    """An environment that gives the text alone: nothing of it is said twice."""
    plain = Observation("Task: nap. You are in the hall.", task="nap", actions=("go",))
    assert HistoryWindow().text([], plain, 0) == plain.text


@pytest.mark.parametrize(("length", "shown"), [(0, [0, 0, 0]), (2, [0, 1, 2]), ("all", [0, 1, 9])])
def test_how_many_steps_are_shown(length, shown):
    assert [HistoryWindow(length).window(n) for n in (0, 1, 9)] == shown


def test_a_negative_window_is_refused():
    with pytest.raises(UserError, match="length=-1"):
        HistoryWindow(-1)


def written(chat: Chat, *more: object) -> tuple[list[int], bool]:
    """Ids and whether history is missing; the text is what the ids were made of."""
    prompt = next_prompt(chat, *more)
    if chat.mode == "rebuild":
        assert prompt.token_ids == chat.opening(Observation(prompt.text, HERE.system))
    return prompt.token_ids, prompt.is_shortened


def prompt_with(shown: int) -> list[int]:
    return CHAT.opening(Observation(HistoryWindow("all").text(STEPS, HERE, shown), HERE.system))


@pytest.mark.parametrize("shown", [0, 1, 2])
def test_the_oldest_history_goes_first(shown):
    """One token short of the next step: exactly the steps that fit are shown."""
    room = len(prompt_with(shown + 1)) - 1
    assert written(CHAT, HistoryWindow("all"), STEPS, HERE, room) == (prompt_with(shown), True)


def test_a_prompt_that_fits_is_whole():
    whole = prompt_with(3)
    assert written(CHAT, HistoryWindow("all"), STEPS, HERE, len(whole)) == (whole, False)


def test_a_prompt_too_long_without_history_is_given_back():
    """The rollout sees its length and ends the episode."""
    assert written(CHAT, HistoryWindow("all"), STEPS, HERE, 10) == (prompt_with(0), True)
    assert written(CHAT, HistoryWindow(0), STEPS, HERE, 10) == (prompt_with(0), False)


@pytest.mark.parametrize("num_steps", [5, 40])
def test_as_many_steps_as_fit_whatever_their_lengths(num_steps):
    """Halving finds what trying every number finds."""
    steps = [step("x" * (7 * i % 31), "go") for i in range(num_steps)]
    prompts = [
        CHAT.opening(Observation(HistoryWindow("all").text(steps, HERE, n), HERE.system)) for n in range(num_steps)
    ]
    for room in range(len(prompts[0]), len(prompts[-1]), 37):
        expected = max((p for p in prompts if len(p) <= room), key=len)
        assert written(CHAT, HistoryWindow("all"), steps, HERE, room) == (expected, True)


def test_without_a_memory_the_chat_decides():
    last = Step(CHAT.opening(HERE), [5, 6], [0.0, 0.0])
    append = Chat(CHAT.tokenizer)
    assert written(CHAT, None, [last], HERE, 0) == (CHAT.opening(HERE), False)
    assert written(append, None, [last], HERE, 0) == (append.next_context(last.context_ids, [5, 6], HERE), False)
    assert next_prompt(append, None, [last], HERE, 0).text == HERE.text


class Corridor:
    """Three steps through rooms that are described at some length."""

    def __init__(self) -> None:
        self.place = 0

    def _look(self) -> Observation:
        return Observation("Walk on.", "Walk.", state=f"room {self.place} " + 40 * ".", task="walk", actions=("on",))

    def reset(self) -> Observation:
        return self._look()

    def step(self, action: str) -> tuple[Observation, float, bool]:
        self.place += 1
        return self._look(), 1.0, self.place == 4

    @property
    def anchor(self) -> int:
        return self.place

    @property
    def success(self) -> bool:
        return self.place == 4

    def close(self) -> None: ...


class Walker:
    """Says `on`."""

    def generate(self, contexts, params, seeds=None):
        return [Completion(CHAT.action_ids("on"), [-0.5] * 3, "stop") for _ in contexts]

    def sync(self, policy) -> None: ...


def walk(memory: Memory, max_length: int):
    context = RolloutContext(
        Walker(),
        CHAT,
        EnvironmentPool(1, 5.0),
        lambda task: Corridor(),
        SamplingParams(max_new_tokens=8),
        max_length,
        memory=memory,
    )
    (group,) = ChainRollout(max_steps=9).collect([Prompt("walk", 0)], 1, context)
    return group.trajectories[0]


def test_a_rollout_with_a_memory():
    """Every step is a row; the system prompt and the task are in each, the last step's words and its neighbour's."""
    trajectory = walk(HistoryWindow(1), 600)
    prompts = [CHAT.tokenizer.decode(s.context_ids) for s in trajectory.steps]
    assert len(trajectory_rows(trajectory, [0.0] * 4)) == 4
    assert all("Walk." in text and "Task: walk" in text and "Actions:\non" in text for text in prompts)
    assert "Observation 3: 'room 2" in prompts[3]
    assert "room 1" not in prompts[3]
    assert (trajectory.num_shortened, trajectory.stop_reason) == (0, StopReason.DONE)


def test_a_rollout_short_of_room_forgets_and_goes_on():
    """Room for two past steps: the third step's prompt still fits, the fourth forgets the first, and says so."""
    roomy = walk(HistoryWindow("all"), 2000)
    room = len(roomy.steps[2].context_ids) + 8
    tight = walk(HistoryWindow("all"), room)
    assert (tight.num_shortened, tight.stop_reason, len(tight.steps)) == (1, StopReason.DONE, 4)
    assert "room 0" not in CHAT.tokenizer.decode(tight.steps[3].context_ids)
    assert tight.steps[:3] == roomy.steps[:3]
    nothing = walk(HistoryWindow("all"), len(roomy.steps[0].context_ids) + 7)
    assert (nothing.stop_reason, nothing.steps) == (StopReason.CONTEXT, [])


WARMUP = """
trainer: {{max_epochs: 1, default_root_dir: {run}}}
model: {{class_path: SFTModule, init_args: {{pretrained: {lm}, lora: {{r: 2, alpha: 4}}}}}}
data:
  class_path: ConversationDataModule
  init_args:
    source: {{class_path: Walkthroughs, init_args: {{environment: {{class_path: EchoSuite}}, num_tasks: 2}}}}
    chat: {chat}
    memory: {{class_path: HistoryWindow, init_args: {{length: 1}}}}
    max_length: 256
"""


def test_a_warm_up_sees_the_prompts_of_the_rollouts(tiny_lm, tmp_path):
    """Supervised rows are rebuilt as well: two turns are two rows, the second retells the first."""
    data = ConversationDataModule(
        Walkthroughs(EchoSuite(), 1), tiny_lm, chat="rebuild", memory=HistoryWindow(1), max_length=256
    )
    data.setup("fit")
    first, second = (CHAT.tokenizer.decode(row.token_ids) for row in data.rows[0])
    word = EchoSuite().tasks("train")[0]
    assert "Steps taken" not in first
    assert f"Task: Say the word: {word}" in second
    assert f"Action 1: '{word}']" in second
    assert "Answer with one word." in second
    (tmp_path / "warmup.yaml").write_text(WARMUP.format(run=tmp_path / "run", lm=tiny_lm, chat="rebuild"))
    main(["fit", "--config", str(tmp_path / "warmup.yaml")])
    assert checkpoint(tmp_path / "run")["global_step"] == 1


def test_a_memory_needs_rebuilt_prompts(tiny_lm, tmp_path, capsys):
    (tmp_path / "warmup.yaml").write_text(WARMUP.format(run=tmp_path / "run", lm=tiny_lm, chat="append"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "warmup.yaml")])
    assert "--data.chat to rebuild" in capsys.readouterr().err
