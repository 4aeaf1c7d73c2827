"""ScienceWorld's real simulator: its own solutions win, and shared simulators do not mix episodes up."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from lit_agentrl.envs.scienceworld import ScienceWorldSuite
from lit_agentrl.envs.scienceworld_servers import Servers
from lit_agentrl.errors import UserError

pytest.importorskip("scienceworld", reason="pip install 'lit-agentrl[scienceworld]'")
if not shutil.which("java"):
    pytest.skip("ScienceWorld needs Java", allow_module_level=True)

NAMES = ["find-living-thing", "lifespan-longest-lived"]


@pytest.fixture(scope="module")
def suite():
    return ScienceWorldSuite(NAMES, max_variations=2, max_servers=2)


def test_splits_are_the_authors_and_do_not_overlap(suite):
    panels = {split: suite.tasks(split) for split in ("train", "val", "test")}
    assert {split: len(panel) for split, panel in panels.items()} == {"train": 4, "val": 4, "test": 4}
    assert len({task for panel in panels.values() for task in panel}) == 12
    assert suite.kind(panels["test"][0]) == NAMES[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_simulators_solution_wins_and_pays_one_in_all(suite, name):
    task = next(task for task in suite.tasks("train") if suite.kind(task) == name)
    turns = suite.walkthrough(task)
    environment = suite.make(task)
    first = environment.reset()
    assert first.task.startswith("Your task is to")
    assert first.task in first.text
    rewards = []
    for _, reply in turns:
        observation, reward, done = environment.step(reply)
        rewards.append(reward)
        assert observation.valid
    assert done
    assert environment.success
    assert sum(rewards) == pytest.approx(1)
    assert min(rewards) >= 0


def test_what_is_not_understood_moves_nothing(suite):
    environment = suite.make(suite.tasks("train")[0])
    environment.reset()
    room, carried, _ = environment.anchor
    for reply in ("dance wildly", ""):
        observation, _, done = environment.step(reply)
        assert (observation.valid, done, environment.anchor[:2]) == (False, False, (room, carried))


def test_a_wrong_focus_ends_the_episode_without_pay(suite):
    """`focus on agent` is an irrevocable wrong answer: the score becomes negative, the pay does not."""
    environment = suite.make(suite.tasks("train")[0])
    environment.reset()
    _, reward, done = environment.step("focus on air")
    assert (done, environment.success) == (True, False)
    assert reward <= 0


@pytest.mark.slow
def test_more_episodes_than_simulators_are_played_again_and_agree():
    """Four episodes on one simulator, in turns: each sees what it would see alone."""
    alone = ScienceWorldSuite(NAMES, max_variations=2, max_servers=1)
    walks = {task: [reply for _, reply in alone.walkthrough(task)][:4] for task in alone.tasks("train")}
    environments = {task: alone.make(task) for task in walks}
    for environment in environments.values():
        environment.reset()
    for turn in range(4):
        for task, environment in environments.items():
            environment.step(walks[task][turn])
    assert sum(environment.num_replayed for environment in environments.values()) == 4 * (1 + 2 + 3)
    for task, environment in environments.items():
        twin = alone.make(task)
        twin.reset()
        for reply in walks[task]:
            twin.step(reply)
        assert (twin.anchor, twin.score, twin.num_replayed) == (environment.anchor, environment.score, 0)


def test_a_snapshot_brings_the_episode_back(suite):
    environment = suite.make(suite.tasks("train")[0])
    environment.reset()
    replies = [reply for _, reply in suite.walkthrough(suite.tasks("train")[0])]
    environment.step(replies[0])
    saved, anchor = environment.snapshot(), environment.anchor
    environment.step(replies[1])
    after = environment.anchor
    environment.restore(saved)
    assert environment.anchor == anchor
    environment.step(replies[1])
    assert environment.anchor == after


def test_threads_share_the_simulators(suite):
    """More threads than simulators: every episode ends, none is mixed up."""
    tasks = list(suite.tasks("train"))

    def play(task: str) -> tuple[object, float]:
        environment = suite.make(task)
        environment.reset()
        for _ in range(3):
            environment.step("look around")
        return environment.anchor, environment.score

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(play, tasks))
    assert together == [play(task) for task in tasks]


def test_a_failing_episode_gives_its_simulator_back():
    servers = Servers(1)
    with pytest.raises(ValueError, match="broken"), servers.borrowed("a"):
        raise ValueError("broken")
    with servers.borrowed("b") as server:
        assert not servers.holds(server, "a")


def test_the_suite_can_be_sent_to_a_process(suite):
    twin = pickle.loads(pickle.dumps(suite))
    assert twin.servers is not suite.servers
    assert twin.names == suite.names


def test_mistakes_are_named_at_once(monkeypatch):
    with pytest.raises(UserError, match="boil"):
        ScienceWorldSuite(["fry"])
    with pytest.raises(UserError, match="progress, success"):
        ScienceWorldSuite(reward="dense")
    with pytest.raises(UserError, match="max_servers=0"):
        ScienceWorldSuite(max_servers=0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="Java"):
        ScienceWorldSuite()
