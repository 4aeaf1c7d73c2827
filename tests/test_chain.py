"""Chain rollouts with a scripted engine: contexts, masks, stop reasons and failures, by hand."""

import time

import numpy as np
import pytest

from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rows import trajectory_rows
from lit_agentrl.types import Completion, Observation, SamplingParams, StopReason
from tiny import byte_tokenizer

CHAT = Chat(byte_tokenizer())


class Counter:
    """Ends after `length` steps, paying 1 for the word `yes`."""

    def __init__(self, task: str, closed: list[str] | None = None) -> None:
        self.task, self.left, self.paid = task, int(task[-1]), 0.0
        self.closed = closed

    def reset(self) -> Observation:
        if self.task.startswith("broken"):
            raise RuntimeError("no such room")
        return Observation(f"{self.left} left", "Say yes.")

    def step(self, action: str) -> tuple[Observation, float, bool]:
        if self.task.startswith("hangs"):
            time.sleep(30)
        self.left -= 1
        self.paid += action == "yes"
        return Observation(f"{self.left} left"), float(action == "yes"), self.left == 0

    @property
    def anchor(self) -> int:
        return self.left

    @property
    def success(self) -> bool:
        return self.paid > 1

    def close(self) -> None:
        if self.closed is not None:
            self.closed.append(self.task)


class Script:
    """Answers `yes`, remembers what it was asked."""

    def __init__(self, word: str = "yes", cut: bool = False) -> None:
        self.word, self.cut = word, cut
        self.contexts: list[list[list[int]]] = []
        self.seeds: list[int] = []

    def generate(self, contexts, params, seeds=None):
        self.contexts.append([list(c) for c in contexts])
        self.seeds += seeds
        ids = CHAT.action_ids(self.word)
        ids = ids[:-1] if self.cut else ids
        return [Completion(list(ids), [-0.5] * len(ids), "length" if self.cut else "stop") for _ in contexts]

    def sync(self, policy) -> None: ...


class Judge(Counter):
    """Says what it thought of the action, and what of its text is the state."""

    def reset(self) -> Observation:
        return Observation("Count down. 2 left", state="2 left", task="Count down.")

    def step(self, action: str) -> tuple[Observation, float, bool]:
        observation, reward, done = super().step(action)
        observation.valid = self.left > 0
        return observation, reward, done


class Painter(Counter):
    """Shows a picture."""

    def reset(self) -> Observation:
        return Observation("Look.", images=(np.zeros((2, 2, 3), np.uint8),))


def roll(
    tasks: list[str],
    engine: Script,
    group_size: int = 2,
    deadline: float = 5.0,
    max_length: int = 600,
    mode: str = "append",
    kind: type[Counter] = Counter,
    **options,
):
    closed: list[str] = []
    context = RolloutContext(
        engine,
        Chat(CHAT.tokenizer, mode),
        EnvironmentPool(4, deadline),
        lambda t: kind(t, closed),
        SamplingParams(max_new_tokens=8),
        max_length,
    )
    prompts = [Prompt(task, i) for i, task in enumerate(tasks)]
    return ChainRollout(**options).collect(prompts, group_size, context), closed


def test_episodes_run_to_their_end_and_only_running_ones_are_generated_for():
    engine = Script()
    groups, closed = roll(["task1", "task3"], engine, max_steps=5)
    assert [len(c) for c in engine.contexts] == [4, 2, 2]
    assert [[len(t.steps) for t in g.trajectories] for g in groups] == [[1, 1], [3, 3]]
    assert all(t.stop_reason is StopReason.DONE for g in groups for t in g.trajectories)
    assert [s.anchor for s in groups[1].trajectories[0].steps] == [3, 2, 1]
    assert [s.reward for s in groups[1].trajectories[0].steps] == [1.0, 1.0, 1.0]
    assert groups[1].trajectories[0].success is True
    assert len(closed) == 4


def test_masks_cover_what_was_sampled_and_nothing_else():
    """Decoding the masked tokens gives the actions; decoding the rest gives prompt and environment."""
    groups, _ = roll(["task2"], Script(), max_steps=5)
    (row,) = trajectory_rows(groups[0].trajectories[0], [1.0, 1.0])
    sampled = [t for t, m in zip(row.token_ids, row.action_mask, strict=True) if m]
    given = [t for t, m in zip(row.token_ids, row.action_mask, strict=True) if not m]
    assert CHAT.tokenizer.decode(sampled) == "yes<|im_end|>yes<|im_end|>"
    assert "1 left" in CHAT.tokenizer.decode(given)
    assert "yes<" not in CHAT.tokenizer.decode(given)


def test_every_sample_has_its_own_seed():
    engine = Script()
    roll(["task2", "task2"], engine, max_steps=5)
    assert len(set(engine.seeds)) == len(engine.seeds) == 8


def test_a_step_keeps_the_state_and_what_became_of_its_action():
    """The verdict on an action comes with the next observation and belongs to the step that took it."""
    groups, _ = roll(["task2"], Script(), max_steps=5, kind=Judge)
    steps = groups[0].trajectories[0].steps
    assert [s.valid for s in steps] == [True, False]
    assert [s.state for s in steps] == ["2 left", "1 left"]  # without a state of its own the text is the state
    assert steps[0].observation == "Count down. 2 left"


def test_images_are_refused_before_anything_is_generated():
    engine = Script()
    with pytest.raises(UserError, match="used as a model of text"):
        roll(["task1"], engine, kind=Painter)
    assert engine.contexts == []


def test_step_limit_is_marked():
    groups, _ = roll(["task9"], Script(), max_steps=2)
    assert {t.stop_reason for t in groups[0].trajectories} == {StopReason.MAX_STEPS}


def test_a_cut_action_ends_the_episode_or_goes_on():
    groups, _ = roll(["task2"], Script(cut=True), max_steps=5)
    assert {t.stop_reason for t in groups[0].trajectories} == {StopReason.LENGTH}
    assert groups[0].trajectories[0].total_reward == 0
    groups, _ = roll(["task2"], Script(cut=True), max_steps=5, cut_actions="continue")
    assert {t.stop_reason for t in groups[0].trajectories} == {StopReason.DONE}


def test_a_full_context_ends_the_episode():
    """120 tokens hold only a few turns of about 30."""
    groups, _ = roll(["task9"], Script(), max_steps=9, max_length=120)
    trajectory = groups[0].trajectories[0]
    assert trajectory.stop_reason is StopReason.CONTEXT
    assert 0 < len(trajectory.steps) < 9
    assert len(trajectory.steps[-1].context_ids) + 8 <= 120


def test_a_crash_fails_its_episode_and_no_other():
    groups, _ = roll(["broken1", "task1"], Script(), max_steps=2)
    assert {t.stop_reason for t in groups[0].trajectories} == {StopReason.ENV_ERROR}
    assert "no such room" in groups[0].trajectories[0].error
    assert {t.stop_reason for t in groups[1].trajectories} == {StopReason.DONE}


def test_a_hang_fails_its_episode_after_the_deadline():
    began = time.perf_counter()
    groups, _ = roll(["hangs1", "task1"], Script(), group_size=1, deadline=0.3, max_steps=2)
    assert time.perf_counter() - began < 5
    assert groups[0].trajectories[0].stop_reason is StopReason.ENV_TIMEOUT
    assert groups[1].trajectories[0].stop_reason is StopReason.DONE


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"cut_actions": "maybe"}])
def test_wrong_arguments_are_refused(options):
    with pytest.raises(UserError):
        ChainRollout(**options)
