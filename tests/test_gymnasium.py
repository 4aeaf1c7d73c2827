"""Others' environments through the adapter: the same episode as by hand, said and read in words."""

import pickle

import numpy as np
import pytest

from lit_agentrl.envs.gymnasium import GymnasiumSuite, as_text, plain_text
from lit_agentrl.errors import UserError

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'lit-agentrl[gymnasium]'")

MOVES = ["left", "down", "right", "up"]
LAKE = {"env_id": "FrozenLake-v1", "options": {"is_slippery": False}, "actions": MOVES}
WAY = ["down", "down", "right", "right", "down", "right"]  # round the holes of the 4x4 map


class Riddle(gymnasium.Env):
    """Takes words: the answer is `echo`."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "I speak without a mouth.", {"solved": False}

    def step(self, action):
        right = action == "echo"
        return ("Yes." if right else "No."), 0.0, right, False, {"solved": right}


class Lever(Riddle):
    action_space = gymnasium.spaces.Box(-1.0, 1.0)


gymnasium.register("lit_agentrl_test/Riddle-v0", Riddle)
gymnasium.register("lit_agentrl_test/Lever-v0", Lever)


def test_the_way_over_the_lake_is_won_as_by_hand():
    suite = GymnasiumSuite(**LAKE, instructions="Reach the goal.")
    environment = suite.make("train-0")
    first = environment.reset()
    assert first.text == "0"
    assert "Reach the goal." in first.system
    assert "left, down, right, up" in first.system
    inner = gymnasium.make("FrozenLake-v1", is_slippery=False)
    inner.reset(seed=0)
    for word in WAY:
        observation, reward, done = environment.step(word)
        expected = inner.step(MOVES.index(word))
        assert (observation.text, reward, done) == (str(expected[0]), expected[1], expected[2])
        assert observation.valid
    assert (done, reward, environment.success) == (True, 1.0, True)
    environment.close()


def test_a_hole_ends_the_episode_without_success():
    environment = GymnasiumSuite(**LAKE).make("train-0")
    environment.reset()
    for word in ("right", "down"):
        _, reward, done = environment.step(word)
    assert (done, reward, environment.success) == (True, 0.0, False)


def test_a_reply_that_is_no_action_changes_nothing():
    environment = GymnasiumSuite(**LAKE).make("train-0")
    environment.reset()
    environment.step("down")
    for reply in ("downright", "go down", "", "4"):
        observation, reward, done = environment.step(reply)
        assert (observation.valid, reward, done, environment.anchor) == (False, 0.0, False, "4")
        assert observation.state == "4"


def test_drawn_text_keeps_the_player_in_brackets():
    environment = GymnasiumSuite(**LAKE, view="ansi").make("train-0")
    assert environment.reset().text.splitlines()[0] == "[S]FFF"
    assert environment.step("down")[0].text.splitlines() == ["  (Down)", "SFFF", "[F]HFH", "FFFH", "HFFG"]
    assert plain_text("a \x1b[34;1mB\x1b[0m \x1b[43m \x1b[0m|") == "a B [ ]|"


def test_pictures_are_handed_over():
    (image,) = GymnasiumSuite(**LAKE, view="image").make("train-0").reset().images
    assert image.dtype == np.uint8
    assert image.ndim == 3


def test_text_spaces_take_the_reply_itself():
    suite = GymnasiumSuite("lit_agentrl_test/Riddle-v0", success_key="solved", action_format="tagged")
    environment = suite.make("test-1")
    assert environment.reset().text == "I speak without a mouth."
    assert environment.step("echo")[0].valid is False  # no tags
    assert environment.step("<action>a word too long</action>")[0].valid is False  # not in the space
    observation, reward, done = environment.step("<think>echo?</think><action>echo</action>")
    assert (observation.text, reward, done, environment.success) == ("Yes.", 0.0, True, True)


def test_seeds_of_the_splits_differ_and_a_task_is_always_the_same():
    suite = GymnasiumSuite("Taxi-v4", num_train=20, num_val=5, num_test=5)
    starts = {task: suite.make(task).reset().text for split in ("train", "val") for task in suite.tasks(split)}
    assert len(set(starts.values())) > 10
    assert all(suite.make(task).reset().text == text for task, text in starts.items())


def test_the_step_limit_ends_the_episode():
    environment = GymnasiumSuite(**LAKE, max_steps=2).make("train-0")
    environment.reset()
    assert [environment.step("left")[2] for _ in range(2)] == [False, True]
    assert environment.success is False


def test_the_suite_can_be_sent_to_a_process():
    suite = pickle.loads(pickle.dumps(GymnasiumSuite(**LAKE)))
    assert suite.make("val-0").reset().text == "0"


def test_observations_in_words():
    assert as_text({"mission": "go", "at": np.array([1, 2]), "pair": (1, "a")}) == "mission: go\nat: [1, 2]\npair: 1, a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_id": "NoSuch-v0"}, "NoSuch"),
        ({"env_id": "no_such_package:Game-v0"}, "no_such_package"),
        ({**LAKE, "actions": ["left", "down"]}, "4 actions"),
        ({**LAKE, "actions": ["left", "left", "right", "up"]}, "different name"),
        ({**LAKE, "options": {"ice": 3}}, "ice"),
        ({"env_id": "Blackjack-v1", "view": "ansi"}, "draws"),
        ({"env_id": "lit_agentrl_test/Lever-v0"}, "Box"),
        ({**LAKE, "view": "sound"}, "observation, ansi, image"),
        ({**LAKE, "max_steps": 0}, "at least 1"),
        ({**LAKE, "num_test": -1}, "num_test"),
    ],
)
def test_mistakes_are_named_at_once(options, message):
    with pytest.raises(UserError, match=message):
        GymnasiumSuite(**options)


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="train-0"):
        GymnasiumSuite(**LAKE).make("train-99999")
