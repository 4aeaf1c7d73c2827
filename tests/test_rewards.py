"""Rewards are weighted sums of named components; parsers judge the response alone."""

import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.rewards import (
    Reward,
    SoftOverlong,
    check_rewards,
    episode_return,
    match_label,
    num_steps,
    parse_answer,
    score,
    solved,
    unfinished,
)
from lit_agentrl.types import Step, StopReason, Trajectory, TrajectoryGroup


def trajectory(*rewards: float, success: bool | None = None) -> Trajectory:
    return Trajectory([Step([1], [2, 3], [0.0, 0.0], reward=r) for r in rewards], success=success)


def test_total_is_the_weighted_sum_and_components_stay_visible():
    t = trajectory(0.5, 1.0, success=True)
    score([TrajectoryGroup("p", [t])], [Reward(), Reward(num_steps, -0.1), Reward(solved, 2.0, "won")])
    assert t.rewards == {"episode_return": 1.5, "num_steps": 2.0, "won": 1.0}
    assert t.total_reward == pytest.approx(1.5 - 0.2 + 2.0)


def test_a_failed_trajectory_is_not_scored():
    t = trajectory(1.0)
    t.stop_reason = StopReason.ENV_TIMEOUT
    score([TrajectoryGroup("p", [t])], [Reward()])
    assert t.rewards == {}


def test_a_reward_that_is_no_number_names_function_and_prompt():
    with pytest.raises(UserError, match=r"'bad' returned nan for prompt 'p7'"):
        score([TrajectoryGroup("p7", [trajectory(1.0)])], [Reward(lambda t: float("nan"), name="bad")])


def test_two_components_of_one_name_are_refused():
    with pytest.raises(UserError, match="same name"):
        check_rewards([Reward(), Reward(episode_return)])


@pytest.mark.parametrize(("tokens", "expected"), [(6, 0.0), (8, -0.5), (10, -1.0), (14, -1.0)])
def test_soft_overlong_penalty(tokens, expected):
    """limit 10, cache 4: free up to 6, then linear, -1 from 10 on."""
    t = Trajectory([Step([1], [0] * tokens, [0.0] * tokens)])
    assert SoftOverlong(10, 4)(t) == expected


def test_soft_overlong_refuses_a_cache_beyond_the_limit():
    with pytest.raises(UserError, match="cache"):
        SoftOverlong(4, 5)


def test_the_last_answer_wins():
    assert parse_answer("<answer>a</answer> no: <answer> b </answer>") == "b"
    assert parse_answer("<answer>open") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Seborrheic keratosis.", "seborrheic keratosis"),
        ("I think it is seborrheic keratosis, not a keratosis", "seborrheic keratosis"),
        ("Probably a keratosis", "keratosis"),
        ("melanomas everywhere", None),
        ("rosacea or melanoma", "melanoma"),
    ],
)
def test_labels_are_whole_words_and_the_longest_wins(text, expected):
    """A label inside a longer one, or inside another word, is not a match."""
    assert match_label(text, ["keratosis", "seborrheic keratosis", "melanoma", "rosacea"]) == expected


def test_what_a_limit_ends_is_unfinished_and_a_failure_is_not():
    """Charged at -0.2 it earns what a wrong answer of bad form does, so that running into the limit does not pay."""
    cut = [r for r in StopReason if unfinished(Trajectory([], stop_reason=r))]
    assert cut == [StopReason.MAX_STEPS, StopReason.LENGTH, StopReason.CONTEXT, StopReason.BUDGET]
    t = Trajectory([Step([0], [1], [0.0])], stop_reason=StopReason.CONTEXT)
    score([TrajectoryGroup("p", [t])], [Reward(), Reward(unfinished, -0.2)])
    assert t.total_reward == -0.2
