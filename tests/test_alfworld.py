"""The ALFWorld suite: scripted wins, episodes, anchors, snapshots, threads, files that are broken or missing."""

import json
import logging
import pickle
import random
import shutil
import threading
from pathlib import Path

import pytest

from alfworld_parts import DOMAIN, GRAMMAR, OBJECTS, REAL, START, needs_real
from lit_agentrl.envs.alfworld import ALFWorldSuite
from lit_agentrl.envs.alfworld.files import GAME, KINDS
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment

SIX = set(KINDS.values())


def write_game(root: Path, task: str, **changes: object) -> Path:
    """The tiny game as a file; a change of None leaves a key out."""
    problem = f"(define (problem p) (:objects {OBJECTS}) (:init {START}) (:goal (in cup_bar_1 desk_bar_1)))"
    content = {"pddl_domain": DOMAIN, "grammar": GRAMMAR, "pddl_problem": problem, "solvable": True} | changes
    path = root / task / GAME
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four training games and one of each other split."""
    for number, kind in enumerate(["pick_and_place_simple", "look_at_obj_in_light", "pick_and_place_simple"]):
        write_game(tmp_path, f"train/{kind}-Cup-None-Desk-{number}/trial_{number}")
    write_game(tmp_path, "train/pick_two_obj_and_place-Cup-None-Desk-1/trial_T1")
    write_game(tmp_path, "valid_seen/pick_and_place_simple-Cup-None-Desk-1/trial_T9")
    write_game(tmp_path, "valid_unseen/pick_and_place_simple-Cup-None-Desk-9/trial_T9")
    return tmp_path


@pytest.fixture
def suite(folder) -> ALFWorldSuite:
    return ALFWorldSuite(str(folder))


@pytest.fixture(scope="module")
def real() -> ALFWorldSuite:
    return ALFWorldSuite(str(REAL))


def say(suite: ALFWorldSuite, *replies: str):
    """A game of the suite, the replies given; the last result."""
    environment = suite.make(suite.tasks("train")[0])
    result = environment.reset(), 0.0, False
    for reply in replies:
        result = environment.step(reply)
    return environment, *result


@needs_real
@pytest.mark.parametrize("kind", sorted(SIX))
def test_scripted_play_wins_real_games_of_every_type(real, kind):
    task = next(task for task in real.tasks("train") if real.kind(task) == kind)
    environment, play = real.make(task), real.walkthrough(task)
    environment.reset()
    results = [environment.step(reply) for _, reply in play]
    assert [reward for _, reward, _ in results] == [0.0] * (len(play) - 1) + [10.0]
    assert [done for _, _, done in results] == [False] * (len(play) - 1) + [True]
    assert environment.success
    assert all(reply in observation.actions for observation, reply in play)
    assert len(play) <= 12


@needs_real
@pytest.mark.slow
def test_every_real_game_is_won(real):
    for split, count in (("train", 36), ("test", 30)):
        assert len(real.tasks(split)) == count
        for task in real.tasks(split):
            environment = real.make(task)
            environment.reset()
            *_, last = (environment.step(reply) for _, reply in real.walkthrough(task, held_out=True))
            assert last[1:] == (10.0, True)


@needs_real
def test_first_observation_of_a_real_game(real):
    task = "train/look_at_obj_in_light-AlarmClock-None-DeskLamp-303/trial_T20190908_144950_175895"
    seen = real.make(task).reset()
    assert seen.state.startswith("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room.")
    assert seen.state.endswith(f"Your task is to: {seen.task}")
    assert "alarmclock" in seen.task
    assert {"look", "inventory", "go to bed 1"} <= set(seen.actions)
    assert seen.text == "\n".join([seen.state, "Commands:", *seen.actions])


@needs_real
def test_releases_differ_in_their_commands(real):
    """The published patch: put X in/on Y becomes move X to Y, and places are called by their names."""
    task = next(task for task in real.tasks("train") if real.kind(task) == "pick_and_place")
    newer = ALFWorldSuite(str(REAL), text_release="2.1.2")
    old, new = real.walkthrough(task), newer.walkthrough(task)
    assert old[-1][1].startswith("put ")
    assert " in/on " in old[-1][1]
    assert new[-1][1] == old[-1][1].replace("put ", "move ").replace(" in/on ", " to ")
    assert old[1][0].state.startswith("You arrive at loc ")
    assert new[1][0].state.startswith(f"You arrive at {new[0][1].removeprefix('go to ')}.")
    environment = newer.make(task)
    environment.reset()
    assert [environment.step(reply)[1] for _, reply in new][-1] == 10.0
    assert ALFWorldSuite(str(REAL), text_release="2.1.1").walkthrough(task) == old


def test_the_newer_release_cannot_be_played_as_the_older_one(folder):
    with pytest.raises(UserError, match=r"commands of release 2.1.2"):
        say(ALFWorldSuite(str(folder), text_release="2.1.1"))


def test_an_episode_by_heart(suite):
    environment, seen, _, _ = say(suite)
    assert seen.state == "You see a chest 1, and a desk 1.\nYour task is to: do it."
    assert seen.text == f"{seen.state}\nCommands:\ngo to chest 1\ngo to desk 1"
    assert (seen.task, seen.actions, seen.valid) == ("do it.", ("go to chest 1", "go to desk 1"), None)
    assert seen.system == "Reply with one of the commands."
    seen, reward, done = environment.step(" Go to  CHEST 1.\n")
    assert (seen.state, seen.valid, reward, done) == ("You go. It is shut.", True, 0.0, False)
    for reply in ("open chest 1", "take cup 2", "go to desk 1"):
        assert environment.step(reply)[1:] == (0.0, False)
    assert not environment.success
    assert environment.step("put cup 2 on desk 1")[1:] == (10.0, True)
    assert environment.success


def test_what_is_not_admissible_changes_nothing(suite):
    environment, _, _, _ = say(suite)
    for reply in ("take cup 1", "dance", "", "do not go to chest 1"):
        before = environment.anchor
        seen, reward, done = environment.step(reply)
        assert (seen.state, seen.valid, reward, done) == ("Nothing happens.", False, 0.0, False)
        assert environment.anchor == before


def test_tagged_replies_and_what_counts_as_valid(folder):
    strict = ALFWorldSuite(str(folder), action_format="tagged")
    lenient = ALFWorldSuite(str(folder), action_format="tagged", validity="format")
    assert "<action>" in say(strict)[1].system
    thought = "<think>chest or desk</think><action>go to chest 1</action>"
    for suite, replies in ((strict, [True, False, False]), (lenient, [True, True, False])):
        tried = [thought, "<action>dance</action>", "go to chest 1"]
        assert [say(suite, reply)[1].valid for reply in tried] == replies
    task = strict.tasks("train")[0]
    assert all(reply.startswith("<action>") for _, reply in strict.walkthrough(task))


def test_commands_can_be_left_out_of_the_text_and_the_reward_be_changed(folder):
    suite = ALFWorldSuite(str(folder), commands=False, reward=1.0)
    environment, seen, _, _ = say(suite)
    assert seen.text == seen.state
    assert seen.actions
    rewards = [environment.step(reply)[1] for _, reply in suite.walkthrough(suite.tasks("train")[0])]
    assert rewards == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_tasks_are_paths_each_once_in_an_order_of_its_own(suite, folder):
    train = suite.tasks("train")
    assert sorted(train) == sorted(
        path.parent.relative_to(folder).as_posix() for path in folder.glob(f"train/*/*/{GAME}")
    )
    assert list(train) != sorted(train)
    assert list(ALFWorldSuite(str(folder)).tasks("train")) == list(train)
    assert [suite.kind(task) for task in suite.tasks("val")] == ["pick_and_place"]
    assert all(task.startswith("valid_unseen/") for task in suite.tasks("test"))


def test_types_and_numbers_of_games(folder, caplog):
    suite = ALFWorldSuite(str(folder), task_types=["pick_two_obj_and_place"])
    assert [suite.kind(task) for task in suite.tasks("train")] == ["pick_two_obj_and_place"]
    with pytest.raises(UserError, match=r"No game of .*valid_seen can be played \(files found: 1 of other types"):
        suite.tasks("val")
    with caplog.at_level(logging.INFO):
        some = ALFWorldSuite(str(folder), max_games=2).tasks("train")
    assert some == ALFWorldSuite(str(folder)).tasks("train")[:2]
    assert "left out: 2 beyond max_games" in caplog.text
    assert "plays 2 ALFWorld games" in caplog.text


@needs_real
def test_order_mixes_types(real):
    assert {real.kind(task) for task in real.tasks("train")[:18]} == SIX


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_types": ["pick"]}, "task_types: pick unknown; allowed are pick_and_place,"),
        ({"task_types": []}, "task_types is empty"),
        ({"max_games": 0}, "max_games=0"),
        ({"action_format": "xml"}, "action_format='xml' is unknown"),
        ({"validity": "none"}, "validity='none' is unknown"),
        ({"text_release": "3"}, "text_release='3' is unknown"),
        ({"reward": 0.0}, "reward=0.0"),
    ],
)
def test_options_out_of_range(folder, options, message):
    with pytest.raises(UserError, match=message):
        ALFWorldSuite(str(folder), **options)


def test_missing_data(tmp_path, folder, monkeypatch, caplog):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(UserError, match=r"ALFWORLD_DATA is set.*alfworld-download.*make-alfworld-games"):
        ALFWorldSuite()
    with pytest.raises(UserError, match="is not a folder"):
        ALFWorldSuite(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no folder train"):
        ALFWorldSuite(str(tmp_path / "empty"))
    # What alfworld-download leaves in $ALFWORLD_DATA.
    shutil.copytree(folder / "train", tmp_path / "download" / "json_2.1.1" / "train")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "download"))
    assert len(ALFWorldSuite().tasks("train")) == 4
    assert ALFWorldSuite().tasks("val") == []
    assert "the val split has no tasks, as there is no folder" in caplog.text
    with pytest.raises(UserError, match="split='dev' is unknown"):
        ALFWorldSuite().tasks("dev")


def test_broken_files_are_left_out_counted_and_named(folder, caplog):
    write_game(folder, "train/pick_and_place_simple-Cup-None-Desk-5/trial_lacks", grammar=None)
    write_game(folder, "train/pick_and_place_simple-Cup-None-Desk-5/trial_unsolvable", solvable=False)
    write_game(folder, "train/pick_and_place_with_movable_recep-Cup-Pan-Desk-5/trial_1")
    write_game(folder, "train/pick_and_place_simple-AppleSliced-None-Desk-5/trial_1")
    cut = write_game(folder, "train/pick_and_place_simple-Cup-None-Desk-5/trial_cut")
    cut.write_text(cut.read_text()[:100])
    with caplog.at_level(logging.INFO):
        assert len(ALFWorldSuite(str(folder)).tasks("train")) == 4
    assert "3 game files of the train split are left out" in caplog.text
    assert f"{cut} is not a readable JSON file" in caplog.text
    assert (
        "trial_lacks/game.tw-pddl is not an ALFWorld game: it lacks pddl_domain, grammar or pddl_problem" in caplog.text
    )
    assert "marked as unsolvable" in caplog.text
    assert "2 of no ALFWorld type" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"pddl_problem": "(define"},
        {"pddl_domain": "x"},
        {"grammar": "x"},
        {"grammar": GRAMMAR.replace('"task"', '"tusk"')},
        {"grammar": GRAMMAR.replace("action Go", "action Walk")},
    ],
)
def test_a_game_whose_contents_are_broken_names_its_file(tmp_path, changes):
    path = write_game(tmp_path, "train/pick_and_place_simple-Cup-None-Desk-5/trial_1", **changes)
    with pytest.raises(UserError, match=f"{path.parent.name}/{GAME} cannot be played"):
        say(ALFWorldSuite(str(tmp_path)))


def test_a_game_without_a_way_to_win_has_no_walkthrough(tmp_path):
    problem = f"(define (problem p) (:objects {OBJECTS}) (:init {START}) (:goal (in cup_bar_1 cup_bar_2)))"
    write_game(tmp_path, "train/pick_and_place_simple-Cup-None-Desk-5/trial_1", pddl_problem=problem)
    suite = ALFWorldSuite(str(tmp_path))
    with pytest.raises(UserError, match="cannot be won"):
        suite.walkthrough(suite.tasks("train")[0])


def test_made_games_and_real_ones_do_not_mix(folder, caplog):
    write_game(folder, "train/pick_and_place_simple-Cup-None-Desk-5/trial_1", made_by="somebody")
    with pytest.raises(UserError, match=r"holds made games \(somebody\) among others"):
        ALFWorldSuite(str(folder)).tasks("train")
    shutil.rmtree(folder / "valid_seen")
    write_game(folder, "valid_seen/pick_and_place_simple-Cup-None-Desk-5/trial_1", made_by="somebody")
    with caplog.at_level(logging.INFO):
        ALFWorldSuite(str(folder)).tasks("val")
    assert "1 ALFWorld-format games made by somebody, not the benchmark's" in caplog.text


@pytest.mark.parametrize("task", ["train/x/y", "../train/a/b", "train/../train", "/etc", "train", "train/a/b/c", ""])
def test_tasks_that_are_none(suite, task):
    with pytest.raises(UserError, match="is not a game of"):
        suite.make(task)
    with pytest.raises(UserError, match="is not a game of"):
        suite.kind(task)


def test_held_out_walkthroughs_have_to_be_asked_for(suite):
    task = suite.tasks("test")[0]
    with pytest.raises(UserError, match="held out"):
        suite.walkthrough(task)
    assert len(suite.walkthrough(task, held_out=True)) == 5


def test_stored_walkthroughs_are_used_if_they_win(tmp_path):
    name = "train/pick_and_place_simple-Cup-None-Desk-{}/trial_1"
    stored = ["go to desk 1", "go to chest 1", "open chest 1", "take cup 2", "go to desk 1", "put cup 2 on desk 1"]
    write_game(tmp_path, name.format(1), walkthrough=stored)
    write_game(tmp_path, name.format(2), walkthrough=stored[1:-1])
    suite = ALFWorldSuite(str(tmp_path))
    assert [reply for _, reply in suite.walkthrough(name.format(1))] == stored
    assert [reply for _, reply in suite.walkthrough(name.format(2))] == stored[1:]


def test_help_is_understood_but_not_offered(tmp_path):
    ask = "(:action Help :parameters (?a - agent) :precondition () :effect (asked ?a))"
    write_game(
        tmp_path,
        "train/pick_and_place_simple-Cup-None-Desk-1/trial_1",
        pddl_domain=DOMAIN.rstrip().removesuffix(")") + ask + ")",
        grammar=GRAMMAR + 'action Help { template :: "help"; feedback :: "You can go."; }',
    )
    _, seen, _, _ = say(ALFWorldSuite(str(tmp_path)), "help")
    assert (seen.state, seen.valid) == ("You can go.", True)
    assert "help" not in seen.actions
    assert "\nhelp" not in seen.text


def random_play(environment, seed: int, steps: int) -> list[object]:
    """All that a random policy sees from here."""
    rng, seen = random.Random(seed), []
    for _ in range(steps):
        observation, reward, done = environment.step(rng.choice(environment.commands))
        seen.append((observation, reward, done, environment.anchor, environment.success))
    return seen


@needs_real
def test_snapshots_are_taken_back_to(real):
    environment = real.make(real.tasks("train")[0])
    assert isinstance(environment, RestorableEnvironment)
    environment.reset()
    random_play(environment, seed=0, steps=10)
    saved = environment.snapshot()
    first = random_play(environment, seed=1, steps=15)
    environment.restore(saved)
    assert random_play(environment, seed=1, steps=15) == first
    other = real.make(real.tasks("train")[0])
    other.reset()
    other.restore(saved)
    assert random_play(other, seed=1, steps=15) == first


@needs_real
def test_episodes_of_a_game_do_not_disturb_one_another(real):
    """Many threads, one game: every episode is as it is alone."""
    task = real.tasks("train")[1]

    def alone(seed: int) -> list[object]:
        environment = real.make(task)
        environment.reset()
        return random_play(environment, seed, steps=12)

    expected = [alone(seed) for seed in range(6)]
    found: dict[int, list[object]] = {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: alone(s)})) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(6)] == expected
    assert len({str(play) for play in expected}) == 6


def test_suites_travel_to_worker_processes(suite):
    copy = pickle.loads(pickle.dumps(suite))
    assert say(copy, "go to desk 1")[1] == say(suite, "go to desk 1")[1]
    pool = EnvironmentPool(num_workers=2)
    results = pool.call([lambda: say(suite, "go to chest 1")[1].state] * 4)
    pool.close()
    assert results == ["You go. It is shut."] * 4
