"""MiniGrid in words: what is seen, by hand; the planner's play wins; no split holds another's game."""

import pickle

import numpy as np
import pytest

from lit_agentrl.envs.minigrid import ACTIONS, MiniGridSuite, describe, state_of
from lit_agentrl.errors import UserError

pytest.importorskip("minigrid", reason="pip install 'lit-agentrl[minigrid]'")

SMALL = {"num_train": 4, "num_val": 2, "num_test": 2}
UNSEEN, EMPTY, WALL, DOOR, BALL = 0, 1, 2, 4, 6
RED, BLUE, OPEN, LOCKED = 0, 2, 0, 2


def view(**at: tuple[int, int, int]) -> np.ndarray:
    """An empty 5 x 5 view with objects at `xCOLUMN_ROW`; the agent stands at (2, 4)."""
    cells = np.zeros((5, 5, 3), np.uint8)
    cells[:, :, 0] = EMPTY
    for name, codes in at.items():
        column, row = (int(part) for part in name[1:].split("_"))
        cells[column, row] = codes
    return cells


@pytest.mark.parametrize(
    ("cells", "carried", "text"),
    [
        (view(), "", "You see nothing."),
        (view(x2_2=(BALL, RED, 0)), "", "You see a red ball 2 ahead."),
        (view(x0_4=(BALL, RED, 0)), "", "You see a red ball 2 to the left."),
        (view(x3_1=(DOOR, BLUE, LOCKED)), "", "You see a locked blue door 3 ahead and 1 to the right."),
        (view(x2_1=(DOOR, BLUE, OPEN)), "", "You see an open blue door 3 ahead."),
        (view(x2_3=(WALL, 5, 0)), "", "You see nothing. You face a wall."),
        (view(x1_3=(WALL, 5, 0)), "", "You see nothing."),
        (view(x2_2=(UNSEEN, 0, 0)), "red key", "You see nothing. You carry a red key."),
        (view(x2_4=(BALL, RED, 0)), "", "You see nothing."),  # where the agent stands MiniGrid draws what it carries
        (
            view(x2_0=(BALL, RED, 0), x1_3=(BALL, BLUE, 0), x3_3=(BALL, RED, 0)),
            "",
            "You see a blue ball 1 ahead and 1 to the left, a red ball 1 ahead and 1 to the right, a red ball 4 ahead.",
        ),
    ],
)
def test_the_view_in_words(cells, carried, text):
    assert describe(cells, carried) == text


@pytest.mark.parametrize("level", ["BabyAI-GoToRedBall-v0", "BabyAI-UnlockLocal-v0", "BabyAI-PutNextLocal-v0"])
def test_the_planners_play_wins_when_it_is_said(level):
    suite = MiniGridSuite(level, **SMALL, action_format="tagged")
    task = suite.tasks("train")[0]
    environment = suite.make(task)
    environment.reset()
    for _, reply in suite.walkthrough(task):
        observation, reward, done = environment.step(f"<think>hm</think>{reply}")
        assert observation.valid
    assert (reward, done, environment.success) == (1.0, True, True)
    assert suite.kind(task) == level


def test_missions_and_directions_agree_with_the_package():
    """Turning right four times sees the same again; what was ahead is then to the left."""
    suite = MiniGridSuite(**SMALL)
    environment = suite.make(suite.tasks("train")[0])
    first = environment.reset()
    assert first.task in first.text
    assert "red ball" in first.task
    seen = [environment.step("turn right")[0].state for _ in range(4)]
    assert seen[-1] == first.state
    assert len(set(seen)) > 1


def test_the_environments_reward_shrinks_with_time():
    suite = MiniGridSuite(**SMALL, reward="environment")
    task = suite.tasks("train")[1]
    environment = suite.make(task)
    environment.reset()
    replies = [reply for _, reply in suite.walkthrough(task)]
    rewards = [environment.step(reply)[1] for reply in replies]
    limit = environment.inner.unwrapped.max_steps
    assert rewards[-1] == pytest.approx(1 - 0.9 * len(replies) / limit)
    assert set(rewards[:-1]) <= {0.0}


def test_a_reply_that_is_no_action_changes_nothing():
    suite = MiniGridSuite(**SMALL)
    environment = suite.make(suite.tasks("train")[0])
    environment.reset()
    before = environment.anchor
    for reply in ("forward", "turn left then turn right", "done", ""):
        observation, reward, done = environment.step(reply)
        assert (observation.valid, reward, done, environment.anchor) == (False, 0.0, False, before)


def test_the_step_limit_ends_the_episode_without_success():
    suite = MiniGridSuite(**SMALL)
    environment = suite.make(suite.tasks("train")[0])
    environment.reset()
    limit = environment.inner.unwrapped.max_steps
    ends = [environment.step("turn left")[2] for _ in range(limit)]
    assert ends == [False] * (limit - 1) + [True]
    assert environment.success is False


def test_a_snapshot_brings_everything_back():
    suite = MiniGridSuite("BabyAI-UnlockLocal-v0", **SMALL)
    task = suite.tasks("train")[0]
    environment = suite.make(task)
    environment.reset()
    replies = [reply for _, reply in suite.walkthrough(task)]
    half = len(replies) // 2
    for reply in replies[:half]:
        environment.step(reply)
    saved, anchor = environment.snapshot(), environment.anchor
    first = [environment.step(reply)[0].text for reply in replies[half:]]
    for _ in range(2):  # twice: playing on must not change the snapshot
        environment.restore(saved)
        assert (environment.anchor, environment.success) == (anchor, False)
        assert [environment.step(reply)[0].text for reply in replies[half:]] == first
        assert environment.success


def test_no_split_holds_anothers_game():
    """A level with few starts: seeds alone would repeat them."""
    suite = MiniGridSuite("MiniGrid-Empty-Random-5x5-v0", num_train=15, num_val=5, num_test=5)
    starts = {}
    for split in ("test", "train", "val"):  # in whatever order they are asked for
        for task in suite.tasks(split):
            environment = suite.make(task)
            environment.reset()
            starts[task] = state_of(environment.inner)
    assert len(starts) == len(set(starts.values())) == 25
    with pytest.raises(UserError, match="too few different starts"):
        MiniGridSuite("MiniGrid-Empty-Random-5x5-v0").tasks("test")


def test_tasks_are_the_same_in_another_process():
    suite = MiniGridSuite(**SMALL)
    suite.tasks("test")
    twin = pickle.loads(pickle.dumps(suite))
    assert twin.tasks("test") == suite.tasks("test")
    task = twin.tasks("test")[0]
    assert twin.make(task).reset() == suite.make(task).reset()


def test_pictures_show_the_view():
    suite = MiniGridSuite(**SMALL, observation="image")
    environment = suite.make(suite.tasks("train")[0])
    first = environment.reset()
    (image,) = first.images
    assert (image.dtype, image.shape) == (np.uint8, (112, 112, 3))  # 7 x 7 tiles of 16 pixels
    assert first.text == first.task
    assert (environment.step("turn right")[0].images[0] != image).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "BabyAI-GoTo"}, "BabyAI-GoTo-v0"),
        ({"level": "CartPole-v1"}, "not one of"),
        ({"observation": "sound"}, "text, image"),
        ({"reward": "dense"}, "success, environment"),
        ({"num_val": -1}, "num_val"),
    ],
)
def test_mistakes_are_named_at_once(options, message):
    with pytest.raises(UserError, match=message):
        MiniGridSuite(**options)


def test_what_cannot_be_shown_is_refused():
    empty = MiniGridSuite("MiniGrid-Empty-5x5-v0", num_train=1, num_val=0, num_test=0)
    with pytest.raises(UserError, match="only BabyAI"):
        empty.walkthrough("train-0")
    suite = MiniGridSuite(**SMALL)
    with pytest.raises(UserError, match="held out"):
        suite.walkthrough(suite.tasks("test")[0])
    with pytest.raises(UserError, match="not a task"):
        suite.make("train-100000")
    assert ACTIONS[2] == "go forward"
