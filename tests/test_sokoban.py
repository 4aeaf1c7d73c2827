"""Sokoban: shortest solutions, boards in one split each, what steps pay, what replies mean, pictures, snapshots."""

import os
import random
import subprocess
import sys
from collections import deque

import pytest

from lit_agentrl.envs.actions import as_reply
from lit_agentrl.envs.sokoban import SokobanEnvironment, SokobanRewards, SokobanSuite
from lit_agentrl.envs.sokoban_boards import (
    ACTIONS,
    Room,
    State,
    digest,
    is_solved,
    move,
    parse_board,
    push_distances,
    render,
)
from lit_agentrl.envs.sokoban_rooms import BoardOptions, Puzzle, board_split, make_puzzle
from lit_agentrl.envs.sokoban_solver import solve
from lit_agentrl.envs.sprites import draw_tiles
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment

SPLITS = ("train", "val", "test")
TWO_BOXES = {"num_boxes": 2, "max_moves": 14}


@pytest.fixture(scope="module", params=[{}, TWO_BOXES], ids=["one box", "two boxes"])
def suite(request) -> SokobanSuite:
    return SokobanSuite(**request.param)


def episode(*rows: str, **options) -> SokobanEnvironment:
    """An episode of a hand-made board."""
    settings = {"rewards": SokobanRewards(-0.1, 1.0, 10.0), "scale": 0, "action_format": "plain"}
    environment = SokobanEnvironment(Puzzle(*parse_board(rows), ()), **settings | {"end_on_deadlock": False} | options)
    environment.reset()
    return environment


def fewest_moves(room: Room, start: State) -> int | None:
    """The slow twin of the solver: breadth first over every state, no estimate, no dead cells."""
    distances, queue = {start: 0}, deque([start])
    while queue:
        state = queue.popleft()
        if is_solved(room, state):
            return distances[state]
        for step in room.moves.values():
            after = move(room, state, step)
            if after not in distances:
                distances[after] = distances[state] + 1
                queue.append(after)
    return None


@pytest.mark.parametrize(
    ("rows", "solution"),
    [
        (["#####", "#PXO#", "#####"], "right"),
        (["######", "#____#", "#_XS_#", "######"], "up left left down right"),  # around the box, onto its other side
        (["#####", "#P__#", "#X__#", "#O__#", "#####"], "down"),
        (["#####", "#P√_#", "#####"], ""),
        (["#####", "#PX_#", "#_O_#", "#####"], None),  # nobody gets above the box
        (["#####", "#XPO#", "#####"], None),
    ],
)
def test_solutions_of_hand_made_boards(rows, solution):
    found = solve(*parse_board(rows), max_states=1000)
    assert (found if found is None else " ".join(found)) == solution


def test_solutions_are_as_short_as_breadth_first_search_finds(suite):
    """The solver, the backwards generator and a plain search agree on every length."""
    for task in suite.tasks("train")[:60]:
        puzzle = suite._puzzle(task)
        assert len(puzzle.solution) == fewest_moves(puzzle.room, puzzle.start)


def test_solver_agrees_on_boards_nobody_designed():
    """Boxes thrown anywhere, many of them hopeless."""
    rng, outcomes = random.Random(0), []
    for _ in range(150):
        floor = [7 * row + column for row in range(1, 6) for column in range(1, 6) if rng.random() < 0.85]
        boxes = rng.sample([cell for cell in floor if 1 < cell // 7 < 5 and 1 < cell % 7 < 5], 2)
        *targets, player = rng.sample([cell for cell in floor if cell not in boxes], 3)
        room, start = Room(7, 7, frozenset(floor), frozenset(targets)), State(player, frozenset(boxes))
        solution, fewest = solve(room, start, 10**6), fewest_moves(room, start)
        assert (None if solution is None else len(solution)) == fewest
        outcomes.append(fewest is None)
    assert 20 < sum(outcomes) < 130  # both kinds are there


def test_a_search_that_is_too_small_finds_nothing():
    board = parse_board(["######", "#____#", "#_XS_#", "######"])
    assert solve(*board, max_states=4) is None
    assert solve(*board, max_states=100) is not None


def test_every_board_is_solved_by_its_walkthrough(suite):
    """Within the wanted number of moves, never before the last one."""
    low, high = suite._options.min_moves, suite._options.max_moves
    for split in SPLITS:
        for task in suite.tasks(split)[:64]:
            turns = suite.walkthrough(task, held_out=True)
            assert low <= len(turns) <= high
            environment = suite.make(task)
            environment.reset()
            outcomes = [environment.step(reply)[2] for _, reply in turns]
            assert outcomes == [False] * (len(turns) - 1) + [True]
            assert environment.success


def test_no_board_is_in_two_splits(suite):
    """By content: not even shifted, turned or mirrored."""
    digests = {split: {suite.digest(task) for task in suite.tasks(split)} for split in SPLITS}
    assert all(board_split(d) == split for split in SPLITS for d in digests[split])
    assert sum(map(len, digests.values())) == len(set().union(*digests.values()))
    assert [len(digests[split]) > 0.9 * len(suite.tasks(split)) for split in SPLITS] == [True] * 3


def test_digest_is_that_of_every_view_of_a_board_and_of_no_other():
    rows = ["######", "#P_#_#", "#_X__#", "#__O_#", "#____#", "######"]
    shifted = ["#######", "##P_#_#", "##_X__#", "##__O_#", "##____#", "#######", "#######"]
    turned = ["".join(column) for column in zip(*rows[::-1], strict=True)]
    views = [rows, shifted, turned, rows[::-1], [row[::-1] for row in rows], [row[::-1] for row in turned]]
    assert len({digest(*parse_board(view)) for view in views}) == 1
    others = [
        [*rows[:4], "#_#__#", "######"],
        ["######", "#_P#_#", *rows[2:]],
        [*rows[:2], "#_O__#", "#__X_#", *rows[4:]],
    ]
    assert len({digest(*parse_board(board)) for board in [rows, *others]}) == 4


def test_a_board_depends_on_its_seed_alone(suite):
    few = SokobanSuite(num_train=3, num_val=0, num_test=200, **(TWO_BOXES if suite._options.num_boxes == 2 else {}))
    assert few.tasks("val") == []
    for task in ["train-2", "test-100"]:
        assert few.make(task).anchor == suite.make(task).anchor
    code = (
        "from lit_agentrl.envs.sokoban import SokobanSuite\nsuite = SokobanSuite(num_boxes=2)\n"
        "for task in suite.tasks('test'):\n    print(suite.walkthrough(task, held_out=True))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 10_000


def test_what_a_play_pays():
    """A box onto its target, off it, a blocked push, a blocked step, nonsense; the numbers of gym-sokoban."""
    environment = episode("########", "#PXO_XO#", "########")
    script = [
        ("right", 0.9, True, "#_P√_XO#"),  # 1 for the box, -0.1 for the step
        ("right", -1.1, True, "#__SXXO#"),  # and taken back
        ("right", -0.1, True, "#__SXXO#"),  # two boxes in a row
        ("up", -0.1, True, "#__SXXO#"),  # a wall
        ("jump", -0.1, False, "#__SXXO#"),
        ("left", -0.1, True, "#_POXXO#"),
    ]
    for action, reward, valid, row in script:
        observation, paid, done = environment.step(action)
        assert paid == pytest.approx(reward)
        assert (observation.valid, done, environment.success) == (valid, False, False)
        assert observation.state.splitlines()[1].replace(" ", "") == row


def test_solving_pays_ten_more():
    environment = episode("#####", "#PXO#", "#####")
    observation, reward, done = environment.step("right")
    assert reward == pytest.approx(10.9)
    assert (done, environment.success, observation.valid) == (True, True, True)
    other = episode("#####", "#PXO#", "#####", rewards=SokobanRewards(0.0, 0.5, 1.0))
    assert other.step("right")[1] == 1.5


def test_what_is_said_of_a_step():
    environment = episode("#####", "#P_O#", "#_X_#", "#___#", "#####")
    assert environment.step("left")[0].text == (
        "You cannot go left.\n# # # # #\n# P _ O #\n# _ X _ #\n# _ _ _ #\n# # # # #\nActions: up, down, left, right"
    )
    assert environment.step("Go left")[0].text.startswith("That is not one of the actions.\n# # # # #\n# P _ O #")
    assert environment.step("right")[0].text.startswith("# # # # #\n# _ P O #")


@pytest.mark.parametrize(
    "reply",
    ["do not go down, go right", "upright", "u p", "still", "", "up, right", "0", "<action>up</action>", "move up"],
)
def test_replies_that_are_no_action(reply):
    """No word is looked for inside a reply: the reference reads "do not go down, go right" as down, "upright" as up."""
    environment = episode("#####", "#___#", "#_P_#", "#XO_#", "#####")
    before = environment.anchor
    observation, reward, done = environment.step(reply)
    assert (observation.valid, reward, done, environment.anchor) == (False, -0.1, False, before)


@pytest.mark.parametrize("reply", ["up", " UP.\n", '"up"', "\n\nup\nbecause it is free"])
def test_replies_that_mean_up(reply):
    environment = episode("#####", "#___#", "#_P_#", "#XO_#", "#####")
    assert environment.step(reply)[0].valid is True
    assert environment.anchor == "#####\n#_P_#\n#___#\n#XO_#\n#####"


def test_tagged_replies():
    """The last block after the thoughts counts, and holds an action and nothing else."""
    environment = episode("#####", "#___#", "#_P_#", "#XO_#", "#####", action_format="tagged")
    for reply in ["up", "<action>go up</action>", "<think><action>up</action></think>", "</action>up<action>"]:
        assert environment.step(reply)[0].valid is False
    assert environment.step("<think>Not <action>down</action>.</think> <action> Up </action>")[0].valid is True
    assert environment.anchor == "#####\n#_P_#\n#___#\n#XO_#\n#####"


def test_a_stuck_box_ends_the_episode_if_asked_to():
    """Beside the right wall, whose column has no target, the box is lost."""
    board = ["######", "#____#", "#PX__#", "#__O_#", "#____#", "######"]
    for ends in (False, True):
        environment = episode(*board, end_on_deadlock=ends)
        assert environment.step("right")[2] is False
        observation, reward, done = environment.step("right")
        assert (reward, done, environment.success) == (-0.1, ends, False)
        assert observation.text.startswith("A box is stuck.") is ends


def test_push_distances():
    """Counted by hand: along the top wall there is no way down; on the target's row and column there is."""
    room, _ = parse_board(["######", "#P___#", "#_X__#", "#__O_#", "#____#", "######"])
    distances = push_distances(room)
    assert {divmod(cell, 6): pushes for cell, pushes in distances.items()} == {
        (3, 3): 0,
        (3, 2): 1,
        (2, 3): 1,
        (2, 2): 2,
    }


def test_anchor_is_the_board_and_text_and_picture_tell_the_same_boards_apart():
    """Over random play, two pictures and two texts are equal exactly if the boards are."""
    text, image = SokobanSuite(**TWO_BOXES), SokobanSuite(observation="image", scale=1, **TWO_BOXES)
    seen: dict[object, tuple[str, bytes]] = {}
    for task in text.tasks("train")[:20]:
        rng, one, other = random.Random(task), text.make(task), image.make(task)
        observations = one.reset(), other.reset()
        for _ in range(25):
            shown = observations[0].state, observations[1].images[0].tobytes()
            assert one.anchor == other.anchor
            assert seen.setdefault(one.anchor, shown) == shown
            action = rng.choice(ACTIONS)
            observations = one.step(action)[0], other.step(action)[0]
    assert len({state for state, _ in seen.values()}) == len({image for _, image in seen.values()}) == len(seen) > 100


def test_the_picture():
    """Tiles of 8 x 8 pixels, enlarged; all seven differ; the text beside it does not show the board."""
    assert len({draw_tiles([symbol], 1).tobytes() for symbol in "#_OXP√S"}) == 7
    observation = SokobanSuite(observation="image", scale=3).make("train-0").reset()
    (picture,) = observation.images
    assert (picture.shape, picture.dtype) == ((144, 144, 3), "uint8")
    assert "#" not in observation.text + observation.state
    small = SokobanSuite(observation="image", scale=1).make("train-0").reset().images[0]
    assert (picture[::3, ::3] == small).all()
    rows = render(*parse_board(["#####", "#PXO#", "#####"]))
    assert (draw_tiles(rows, 1)[8:16, 16:24] == draw_tiles(["X"], 1)).all()


def test_task_and_offer_are_the_same_at_every_step(suite):
    for number, (observation, _) in enumerate(suite.walkthrough("train-1")):
        assert observation.task == "Push every box onto a target."
        assert observation.actions == ACTIONS
        assert observation.valid is (True if number else None)
        assert ("Symbols: # wall" in observation.system) is (number == 0)
        assert f"{observation.state}\nActions: up, down, left, right" in observation.text


def test_snapshot_and_restore(suite):
    """Playing on does not touch a snapshot, and what follows it is the same again."""
    environment = suite.make("train-0")
    assert isinstance(environment, RestorableEnvironment)
    environment.reset()
    environment.step("up")
    saved, anchor, futures = environment.snapshot(), environment.anchor, []
    for _ in range(2):
        rng = random.Random(3)
        futures.append([environment.step(rng.choice(ACTIONS)) for _ in range(20)])
        environment.restore(saved)
        assert environment.anchor == anchor
    assert futures[0] == futures[1]


def test_kind_is_the_length_in_fives():
    suite = SokobanSuite(min_moves=5, max_moves=6, num_train=40)
    for task in suite.tasks("train"):
        assert suite.kind(task) == {5: "moves_1_5", 6: "moves_6_10"}[len(suite.walkthrough(task))]
    assert {suite.kind(task) for task in suite.tasks("train")} == {"moves_1_5", "moves_6_10"}


def test_walkthrough_of_a_held_out_board_must_be_asked_for(suite):
    with pytest.raises(UserError, match="'val-0' is held out"):
        suite.walkthrough("val-0")
    tagged = SokobanSuite(action_format="tagged").walkthrough("train-0")
    plain = SokobanSuite().walkthrough("train-0")
    assert [reply for _, reply in tagged] == [as_reply(reply, "tagged") for _, reply in plain]


@pytest.mark.parametrize("task", ["train-512", "dev-0", "train-", "train--1", "train-1x", "0", "train-01"])
def test_unknown_task(task):
    with pytest.raises(UserError, match="is not a task of this suite"):
        SokobanSuite().make(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size=4 is out of range: allowed are 5 to 20"),
        ({"num_boxes": 5}, "num_boxes=5 is out of range: allowed are 1 to 4"),
        ({"min_moves": 11}, "min_moves=11 is out of range: allowed are 1 to 10"),
        ({"num_train": -1}, "num_train=-1"),
        ({"observation": "pixels"}, "allowed are 'text' and 'image'"),
        ({"action_format": "json"}, "action_format='json'"),
        ({"scale": 0}, "scale=0"),
    ],
)
def test_refuses_options_that_can_not_work(options, message):
    with pytest.raises(UserError, match=message):
        SokobanSuite(**options)


def test_boards_that_do_not_exist_are_said_not_to():
    with pytest.raises(UserError, match="No Sokoban board was found in 500 rooms of size=5"):
        make_puzzle(0, "train", BoardOptions(5, 1, 90, 90, 1000))


def test_a_bigger_room():
    """Eight by eight with three boxes, the search limit in play: still solved by the walkthrough."""
    suite = SokobanSuite(size=8, num_boxes=3, min_moves=10, max_moves=30, num_train=4)
    for task in suite.tasks("train"):
        environment = suite.make(task)
        environment.reset()
        assert [environment.step(reply)[2] for _, reply in suite.walkthrough(task)][-1] is True
