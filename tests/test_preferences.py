"""Pairs made by hand: which actions are compared, what each is worth, and which pairs are kept."""

import math
from typing import Any

import pytest
import torch

from lit_agentrl.advantages import discounted_returns
from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageRef
from lit_agentrl.preferences.anchor_actions import anchor_actions, discounted
from lit_agentrl.preferences.answers import Answer, Question, asked, best_and_worst
from lit_agentrl.preferences.candidates import Candidate, prompt_messages
from lit_agentrl.preferences.filters import Filters, is_similar, keep
from lit_agentrl.preferences.siblings import tree_siblings
from lit_agentrl.types import Step, StopReason, Trajectory, TrajectoryGroup

SYSTEM = {"role": "system", "content": "Be good."}


def step(action: str, prompt: str = "hall", reward: float = 0.0, **more: Any) -> Step:
    ids = list(prompt.encode())
    return Step(
        ids,
        [1],
        [0.0],
        reward,
        observation=prompt,
        state=prompt,
        action=action,
        system="Be good.",
        prompt=prompt,
        **more,
    )


def episode(*steps: Step, reward: float, success: bool | None = None, tree: int = 0, **more: Any) -> Trajectory:
    return Trajectory(list(steps), tree_id=tree, total_reward=reward, success=success, **more)


def found(candidates: list[Candidate]) -> list[tuple[str, str, float]]:
    return [(each.chosen, each.rejected, round(each.gap, 9)) for each in candidates]


# --- trees ---


def forest() -> TrajectoryGroup:
    """Tree 0: `go` then (`left`: 1, `right`: 0), and `stay`: 0.25 from the root. Tree 1: `jump`: 0."""
    go = step("go")
    return TrajectoryGroup(
        "task",
        [
            episode(go, step("left", "fork"), reward=1.0, success=True),
            episode(go, step("right", "fork"), reward=0.0, success=False),
            episode(step("stay"), reward=0.25, success=False),
            episode(step("jump"), reward=0.0, success=False, tree=1),
        ],
    )


def test_siblings_by_the_mean_reward_below_them() -> None:
    """At the root `go` is worth 0.5, `jump` 0; at the fork `left` beats `right` by 1."""
    root, fork = tree_siblings(forest())
    assert found([root, fork]) == [("go", "jump", 0.5), ("left", "right", 1.0)]
    assert root.prompt == [SYSTEM, {"role": "user", "content": "hall"}]
    assert fork.prompt == [*root.prompt, {"role": "assistant", "content": "go"}, {"role": "user", "content": "fork"}]
    assert (root.is_correct, fork.is_correct) == (True, True)
    assert root.provenance["chosen"] == {"trajectories": [0, 1], "tree": 0, "value": 0.5, "rewards": [1.0, 0.0]}
    assert (root.provenance["task"], fork.provenance["step"]) == ("task", 1)


def test_more_pairs_and_trees_apart() -> None:
    """The best against the worst, then the next worse; a tree by itself has no second root action but `stay`."""
    assert found(tree_siblings(forest(), pairs_per_node=5)) == [
        ("go", "jump", 0.5),
        ("go", "stay", 0.25),
        ("left", "right", 1.0),
    ]
    assert found(tree_siblings(forest(), across_trees=False)) == [("go", "stay", 0.25), ("left", "right", 1.0)]


def test_failed_episodes_count_nowhere() -> None:
    """Without the one that earned 1, `go` is worth 0 and the fork has one action: no pair is there."""
    group = forest()
    group.trajectories[0].stop_reason = StopReason.ENV_ERROR
    assert found(tree_siblings(group)) == [("stay", "jump", 0.25)]


def test_rebuilt_prompts_are_the_turn_alone() -> None:
    group = forest()
    _, fork = tree_siblings(group, "rebuild")
    assert fork.prompt == [SYSTEM, {"role": "user", "content": "fork"}]


def test_equal_actions_of_two_chains_are_two_branches() -> None:
    """Sampled twice, they are told apart by what followed; the filter for equal words drops the pair."""
    group = TrajectoryGroup("task", [episode(step("go"), reward=1.0), episode(step("go"), reward=0.0)])
    kept, counts = keep(tree_siblings(group), Filters())
    assert kept == []
    assert counts == {"identical": 1}


def test_images_of_the_first_turn_come_along_later_ones_do_not() -> None:
    """A preference file has no place for an image of a later turn."""
    seen, other = ImageRef("a.png", "0" * 64), ImageRef("b.png", "1" * 64)
    go = step("go", images=(seen,))
    group = TrajectoryGroup(
        "task",
        [
            episode(go, step("left", "fork", images=(seen, other)), reward=1.0),
            episode(go, step("right", "fork", images=(seen, other)), reward=0.0),
            episode(step("stay", images=(seen,)), reward=0.0),
        ],
    )
    (root,) = tree_siblings(group)
    assert root.images == (seen,)
    assert [each.images for each in tree_siblings(group, "rebuild")] == [(seen,), (seen, other)]


def test_a_step_without_its_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="without `prompt`"):
        prompt_messages([Step([1], [2], [0.0], action="go")], 0, "append")


# --- anchors ---


def test_returns_are_discounted_and_hold_all_of_the_reward() -> None:
    """Paid 1, 0, 2 of a total of 4: the last step also gets the 1 that is left. Equal to the library's returns."""
    trajectory = episode(step("a", reward=1.0), step("b"), step("c", reward=2.0), reward=4.0)
    assert discounted(trajectory, 0.5) == [1 + 0.25 * 3, 0.5 * 3, 3.0]
    expected = discounted_returns(
        torch.tensor([1.0, 0.0, 3.0]).double(), torch.zeros(3).long(), torch.arange(3), gamma=0.5
    )
    assert discounted(trajectory, 0.5) == expected.tolist()


def visits() -> TrajectoryGroup:
    """In the hall: north twice (returns 1 and 0), south (0), and wait, which leads there again, where south wins."""
    return TrajectoryGroup(
        "task",
        [
            episode(step("north", reward=1.0), reward=1.0, success=True),
            episode(step("north"), reward=0.0, success=False),
            episode(step("south"), reward=0.0, success=False),
            episode(step("wait"), step("south", reward=1.0), reward=1.0, success=True),
        ],
    )


def test_actions_of_a_state_by_their_mean_return() -> None:
    """wait 0.9, north 0.5, south (0 + 1) / 2 = 0.5: the worst is the one that came last."""
    (pair,) = anchor_actions(visits(), gamma=0.9)
    assert found([pair]) == [("wait", "south", 0.4)]
    assert pair.is_correct is True
    assert pair.provenance["rejected"] == {"steps": [[2, 0], [3, 1]], "value": 0.5, "returns": [0.0, 1.0]}
    assert found(anchor_actions(visits(), gamma=0.9, pairs_per_state=9)) == [
        ("wait", "south", 0.4),
        ("wait", "north", 0.4),
    ]


def test_states_are_told_apart_by_the_anchor_that_is_asked_for() -> None:
    """With the history in the anchor, the hall after waiting is another state."""
    assert found(anchor_actions(visits(), gamma=0.9, anchor="text_history")) == [("wait", "south", 0.9)]
    for trajectory in visits().trajectories:
        assert trajectory.steps[0].anchor is None
    with pytest.raises(UserError, match="anchor: state"):
        anchor_actions(visits(), anchor="state")


def test_an_action_after_another_history_is_marked_or_left_out() -> None:
    """The same state seen at the second step: its action answered a longer prompt."""
    later = step("jump", reward=1.0)
    later.context_ids = [9, 9, *later.context_ids]
    group = TrajectoryGroup("task", [episode(step("north"), later, reward=1.0)])
    (pair,) = anchor_actions(group, gamma=0.5)
    assert found([pair]) == [("jump", "north", 0.5)]
    assert pair.provenance["same_prompt"] is False
    assert [message["content"] for message in pair.prompt] == ["Be good.", "hall", "north", "hall"]
    assert anchor_actions(group, gamma=0.5, same_prompt=True) == []


def test_a_step_that_trajectories_share_was_taken_once() -> None:
    """`go` leads to 1 and 0 and was sampled once: worth 0.5, not counted twice against another `go` worth 0."""
    go = step("go")
    group = TrajectoryGroup(
        "task",
        [
            episode(go, step("left", "fork"), reward=1.0),
            episode(go, step("right", "fork"), reward=0.0),
            episode(step("go"), reward=0.0),
            episode(step("stay"), reward=0.0),
        ],
    )
    pairs = anchor_actions(group, gamma=1.0)
    assert found(pairs) == [("go", "stay", 0.25), ("left", "right", 1.0)]


# --- answers ---


def test_the_best_answer_is_a_right_one() -> None:
    """A wrong answer with a higher score is rejected by the right one, and the gap says that it is below 0."""
    answers = [Answer("a", 0.5, False), Answer("b", 0.2, True), Answer("c", -1.0, None)]
    question = Question("task", [{"role": "user", "content": "?"}])
    assert found(best_and_worst(question, answers, "m", 5)) == [("b", "c", 1.2), ("b", "a", -0.3)]
    assert best_and_worst(question, answers[:1], "m") == []


def test_only_single_turns_are_questions() -> None:
    one = TrajectoryGroup("task", [episode(step("a"), reward=0.0), episode(reward=0.0, stop_reason=StopReason.CONTEXT)])
    question = asked(one)
    assert question is not None
    assert question.prompt == [SYSTEM, {"role": "user", "content": "hall"}]
    one.trajectories.append(episode(step("a"), step("b"), reward=0.0))
    assert asked(one) is None
    assert asked(TrajectoryGroup("task", [])) is None


# --- filters ---


def candidate(
    chosen: str = "a good answer", rejected: str = "something else", gap: float = 1.0, **more: Any
) -> Candidate:
    return Candidate([{"role": "user", "content": "?"}], chosen, rejected, gap, **({"is_correct": True} | more))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (candidate(), ""),
        (candidate(is_correct=None), ""),
        (candidate(gap=0.3), ""),
        (candidate(gap=0.29), "small_gap"),
        (candidate(gap=-1.0), "small_gap"),
        (candidate(gap=math.nan), "small_gap"),
        (candidate(is_correct=False), "incorrect"),
        (candidate(chosen=" "), "empty"),
        (candidate(rejected=""), "empty"),
        (candidate(rejected="half a \N{REPLACEMENT CHARACTER}"), "undecodable"),
        (candidate(rejected="a good answer\n"), "identical"),
        (candidate(chosen="x" * 20, rejected="y" * 40), ""),
        (candidate(chosen="x" * 19, rejected="y" * 40), "length_ratio"),
        (candidate(chosen="x" * 41, rejected="y" * 20), "length_ratio"),
        (candidate(chosen="abcdefghi " * 4, rejected="abcdefghi " * 3 + "abcdefghX "), "similar"),
    ],
)
def test_filters_by_hand(made: Candidate, reason: str) -> None:
    assert Filters().reason_against(made) == reason
    kept, counts = keep([made], Filters())
    assert (len(kept), dict(counts)) == ((1, {}) if not reason else (0, {reason: 1}))


def test_filters_can_be_opened() -> None:
    """No gap asked for still means a gap: equal answers have no better one."""
    lax = Filters(min_gap=0.0, correct=False, max_similarity=1.0, length_ratio=(0.0, math.inf))
    assert lax.reason_against(candidate(gap=1e-9, is_correct=False, chosen="x" * 500)) == ""
    assert lax.reason_against(candidate(gap=0.0)) == "small_gap"


def test_similarity_is_difflibs() -> None:
    """2 M / T: 39 of 40 characters alike is 0.975; the quick bounds decide nothing that the ratio would not."""
    assert is_similar("x" * 39 + "a", "x" * 39 + "b", 0.975)
    assert not is_similar("x" * 39 + "a", "x" * 39 + "b", 0.976)
    assert not is_similar("ab" * 10, "ba" * 10, 0.96)  # the same letters: the quick bounds are 1


def test_duplicates_are_counted() -> None:
    kept, counts = keep([candidate(), candidate(gap=2.0), candidate(chosen="another one")], Filters())
    assert [each.gap for each in kept] == [1.0, 1.0]
    assert counts == {"duplicate": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": -0.1}, "min_gap=-0.1"),
        ({"min_gap": math.nan}, "min_gap=nan"),
        ({"max_similarity": 0.0}, "max_similarity=0"),
        ({"length_ratio": (2.0, 0.5)}, "length_ratio"),
        ({"length_ratio": (1.5, 2.0)}, "length_ratio"),
    ],
)
def test_filters_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Filters(**options)
