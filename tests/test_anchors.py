"""Which steps are taken in the same state: keys, integers, similarity."""

import random
from difflib import SequenceMatcher
from enum import IntEnum

import numpy as np
import pytest

from lit_agentrl.anchors import anchor_keys, group_similar, numbered, typed
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.replies import LONGEST, decision
from lit_agentrl.types import Step, Trajectory


def step(state: str, action: str = "go", anchor: object = 0, observation: str = "") -> Step:
    return Step([1], [2], [0.0], state=state, action=action, anchor=anchor, observation=observation or f"{state} +")


LOOP = Trajectory([step("hall", "north"), step("attic", "south"), step("hall", "north"), step("attic", "jump")])


def test_text_is_the_observation_alone():
    """A loop meets its own states again; a rollout that does not fill `state` is compared by what was shown."""
    assert numbered(anchor_keys(LOOP)) == [0, 1, 0, 1]
    shown = Trajectory([Step([1], [2], [0.0], observation=text) for text in ("a", "b", "a")])
    assert numbered(anchor_keys(shown)) == [0, 1, 0]


def test_text_history_tells_apart_by_what_was_done():
    """With one pair the first step is alone (nothing before it); with two all four are; with none it is the text."""
    assert numbered(anchor_keys(LOOP, "text_history", history=0)) == [0, 1, 0, 1]
    assert numbered(anchor_keys(LOOP, "text_history", history=1)) == [0, 1, 2, 1]
    assert numbered(anchor_keys(LOOP, "text_history", history=2)) == [0, 1, 2, 3]


def test_text_history_compares_actions_not_thoughts():
    """Two ways of thinking about the same action are one history."""
    said = ("<think>left or right</think><action>left</action>", "<think>hm</think> <action> left </action>", "right")
    first, second, third = (anchor_keys(Trajectory([step("a", text), step("b")]), "text_history")[1] for text in said)
    assert first == second != third


def test_state_is_the_environments_own_key():
    """Looking alike is not being alike: the same text with another inventory."""
    same_text = Trajectory(
        [step("Nothing happens.", anchor=("kitchen", "mug")), step("Nothing happens.", anchor="bath")]
    )
    assert numbered(anchor_keys(same_text)) == [0, 0]
    assert numbered(anchor_keys(same_text, "state")) == [0, 1]
    with pytest.raises(UserError, match="anchor: state needs"):
        anchor_keys(Trajectory([step("a", anchor=None)]), "state")


def test_numbers_are_those_of_the_first_appearance():
    assert numbered(["b", "a", "b", "c", "a"]) == [0, 1, 0, 2, 1]
    assert numbered([]) == []


class Place(IntEnum):
    HALL = 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (1, "1"),
        (1, Place.HALL),
        ((1, 2), [1, 2]),
        ((1, (2, 3)), (1, 2, 3)),
        ((1,), (True,)),
        ({"a": 1}, {"a": True}),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(2, np.int32), np.zeros(2, np.float32)),
        (np.array([1, None]), np.array([True, None])),
    ],
)
def test_keys_of_different_types_are_different(one, other):
    """Python's `==` merges most of these pairs, and the authors' code flattens the arrays."""
    assert typed(one) != typed(other)
    assert numbered([typed(one), typed(other), typed(one)]) == [0, 1, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (float("nan"), float("nan")),
        (np.int64(3), 3),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2}, {2, 1}),
        (np.arange(4).reshape(2, 2), np.arange(4).reshape(2, 2)),
        ([[1], ["x"]], [[1], ["x"]]),
        (frozenset({("a", 1)}), frozenset({("a", 1)})),
    ],
)
def test_equal_states_are_equal_keys(one, other):
    assert typed(one) == typed(other)
    assert hash(typed(one)) == hash(typed(other))


def test_what_cannot_be_a_key_is_named():
    with pytest.raises(UserError, match="holds a bytearray"):
        typed(("a", bytearray(b"x")))


# --- similarity ---

NEAR = ("abcdefghij", "abcdefghix", "abcdefghyx")  # 2 * 9 / 20 = 0.9 to its neighbour, 2 * 8 / 20 = 0.8 over two


def test_similar_texts_by_hand():
    """At 0.85 the first two are one state and the third, 0.8 from the representative, is another: no chaining."""
    assert group_similar(NEAR, [0, 0, 0], 0.85) == [0, 0, 1]
    assert group_similar(NEAR, [0, 0, 0], 0.75) == [0, 0, 0]
    assert group_similar(NEAR, [0, 0, 0], 0.95) == [0, 1, 2]
    assert group_similar(NEAR, [0, 0, 0], 0.9) == [0, 0, 1]  # the threshold itself is enough


def test_similar_texts_of_different_groups_never_meet():
    assert group_similar(NEAR, [0, 1, 0], 0.85) == [0, 1, 2]


def test_the_order_of_the_rows_decides_in_batch_order_alone():
    """Middle first, all three join it; the canonical order goes by frequency, then by the alphabet."""
    middle_first = (NEAR[1], NEAR[0], NEAR[2])
    assert group_similar(middle_first, [0] * 3, 0.85, order="batch") == [0, 0, 0]
    assert group_similar(NEAR, [0] * 3, 0.85, order="batch") == [0, 0, 1]
    assert group_similar(middle_first, [0] * 3, 0.85) == [0, 0, 1]
    assert group_similar([*NEAR, NEAR[1]], [0] * 4, 0.85) == [0, 0, 0, 0]  # now the middle is the most frequent


def partition(clusters: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, c in enumerate(clusters) if c == cluster) for cluster in clusters}


def random_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("ab ") for _ in range(rng.randint(3, 6))) for _ in range(25)]


@pytest.mark.parametrize("seed", range(4))
def test_canonical_clusters_do_not_depend_on_the_rows(seed):
    """The same partition for every permutation."""
    texts, rng = random_texts(seed), random.Random(seed)
    groups = [rng.randrange(3) for _ in texts]
    order = list(range(len(texts)))
    rng.shuffle(order)
    expected = partition(group_similar(texts, groups, 0.7))
    shuffled = group_similar([texts[i] for i in order], [groups[i] for i in order], 0.7)
    assert {frozenset(order[i] for i in members) for members in partition(shuffled)} == expected
    assert len(expected) < len(set(zip(texts, groups, strict=True)))  # something was merged


@pytest.mark.parametrize("autojunk", [False, True])
def test_batch_order_equals_the_plain_loop(autojunk):
    """No memo of texts, no bounds: every row against every representative."""
    for seed in range(4):
        texts = random_texts(seed)
        representatives: list[str] = []
        expected = []
        for text in texts:
            ratios = [SequenceMatcher(None, text, r, autojunk).ratio() for r in representatives]
            place = next((i for i, ratio in enumerate(ratios) if ratio >= 0.7), len(ratios))
            representatives += [text] * (place == len(ratios))
            expected.append(place)
        assert group_similar(texts, [0] * len(texts), 0.7, autojunk, order="batch") == expected


def test_autojunk_makes_long_boards_unlike():
    """Two boards of 207 characters that differ in one move: 0.99 alike, but difflib calls most of it junk."""
    board = "\n".join([" ".join("########"), *[" ".join("#______#")] * 12])
    moved = board.replace("_", "P", 1)
    assert len(board) >= 200
    assert group_similar([board, moved], [0, 0], 0.95) == [0, 0]
    assert group_similar([board, moved], [0, 0], 0.95, autojunk=True) == [0, 1]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        group_similar(["a"], [0], threshold)


# --- what a reply decides ---


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("go north", "go north"),
        ("\n  go north\nbecause", "go north"),
        ("<think>a\nb</think>\n\n<action>go</action>", "go"),
        ("<think>a\nb</think>\n\ngo", "go"),
        ("", ""),
        ("x" * 999, "x" * LONGEST),
    ],
)
def test_decision(reply, action):
    assert decision(reply) == action
