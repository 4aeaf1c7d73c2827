"""NumberLine: every pair in one split, what steps pay, what replies mean, pictures, snapshots."""

import pytest

from lit_agentrl.envs.number_line import NumberLineSuite
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment

SPLITS = ("train", "val", "test")


@pytest.mark.parametrize(("largest", "sizes"), [(5, [18, 6, 6]), (9, [54, 18, 18])])
def test_every_pair_is_in_one_split(largest, sizes):
    tasks = [NumberLineSuite(max_position=largest).tasks(split) for split in SPLITS]
    numbers = range(largest + 1)
    assert [len(names) for names in tasks] == sizes
    assert sorted(task for names in tasks for task in names) == sorted(
        f"{a}-to-{b}" for a in numbers for b in numbers if a != b
    )


def test_what_a_walk_pays():
    """Away, against the end, nonsense, closer, and the goal; worked out by hand."""
    environment = NumberLineSuite().make("1-to-2")
    environment.reset()
    script = [("-", -1, 0), ("-", -1, 0), ("+1", 0, 0), ("+", 0, 1), ("+", 1, 2)]
    for action, reward, position in script:
        observation, paid, done = environment.step(action)
        assert (paid, observation.valid) == (reward, action != "+1")
        assert observation.state == f"Current: {position}"
        assert done is environment.success is (position == 2)


def test_an_invalid_reply_pays_what_it_is_told_to():
    environment = NumberLineSuite(invalid_reward=-0.5).make("1-to-2")
    environment.reset()
    assert environment.step("up")[1:] == (-0.5, False)


@pytest.mark.parametrize(
    ("reply", "valid"),
    [
        ("+", True),
        (" -\n", True),
        ('"+"', True),
        ("+.", True),
        ("+ -", False),
        ("++", False),
        ("1 + 1", False),
        ("", False),
    ],
)
def test_a_reply_is_a_whole_action(reply, valid):
    environment = NumberLineSuite().make("2-to-5")
    environment.reset()
    assert environment.step(reply)[0].valid is valid
    assert (environment.anchor != (5, 2)) is valid


@pytest.mark.parametrize("action_format", ["plain", "tagged"])
def test_walkthroughs_win_on_the_straight_way(action_format):
    suite = NumberLineSuite(max_position=7, action_format=action_format)
    for split in SPLITS:
        for task in suite.tasks(split):
            start, goal = map(int, task.split("-to-"))
            turns = suite.walkthrough(task, held_out=True)
            environment = suite.make(task)
            environment.reset()
            rewards = [environment.step(reply)[1] for _, reply in turns]
            assert rewards == [0.0] * (abs(goal - start) - 1) + [1.0]
            assert environment.success


def test_held_out_pairs_are_kept_back():
    suite = NumberLineSuite()
    for split in SPLITS[1:]:
        for task in suite.tasks(split):
            with pytest.raises(UserError, match=f"'{task}' is held out"):
                suite.walkthrough(task)


def test_what_is_said():
    environment = NumberLineSuite().make("2-to-5")
    first = environment.reset()
    assert first.text == "Target: 5\nCurrent: 2\nActions: +, -"
    assert "from 0 to 5" in first.system
    second, _, _ = environment.step("right")
    assert second.text == "That is not one of the actions.\nTarget: 5\nCurrent: 2\nActions: +, -"
    assert (second.task, second.state, second.actions) == ("Target: 5", "Current: 2", ("+", "-"))


def test_pictures_are_equal_for_equal_states_only():
    """All 12 x 13 of them have one size, tell the target from the current number, and the text gives nothing away."""
    suite, pictures = NumberLineSuite(max_position=12, observation="image", scale=1), {}
    for split in SPLITS:
        for task in suite.tasks(split):
            observation = suite.make(task).reset()
            (picture,) = observation.images
            pictures[task] = picture.tobytes()
            assert (picture.shape, picture.dtype) == ((30, 21, 3), "uint8")
            assert not any(letter.isdigit() for letter in observation.text + observation.task + observation.state)
    assert len(set(pictures.values())) == len(pictures) == 12 * 13
    environment = suite.make("2-to-5")
    environment.reset()
    assert environment.step("+")[0].images[0].tobytes() == pictures["3-to-5"]


def test_snapshot_and_restore():
    environment = NumberLineSuite().make("2-to-5")
    assert isinstance(environment, RestorableEnvironment)
    environment.reset()
    environment.step("+")
    saved, anchor = environment.snapshot(), environment.anchor
    futures = []
    for _ in range(2):
        futures.append([environment.step(action) for action in "-+++"])
        environment.restore(saved)
        assert environment.anchor == anchor == (5, 3)
        assert environment.success is False
    assert futures[0] == futures[1]


@pytest.mark.parametrize("task", ["2-to-2", "2-to-6", "6-to-2", "02-to-3", "2", "a-to-b", "2-to-", "-1-to-2"])
def test_unknown_task(task):
    with pytest.raises(UserError, match="max_position=5"):
        NumberLineSuite().make(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_position": 3}, "max_position=3 is out of range: allowed are 4 to 999"),
        ({"scale": 0}, "scale=0"),
        ({"observation": "pixels"}, "observation='pixels'"),
        ({"action_format": "json"}, "action_format='json'"),
    ],
)
def test_refuses_options_that_can_not_work(options, message):
    with pytest.raises(UserError, match=message):
        NumberLineSuite(**options)
