"""What holds for every suite that needs neither data nor a server: splits, repeatability, and other processes."""

import os
import pickle
from pathlib import Path

import pytest

from derm_parts import Pixels
from lit_agentrl.envs import (
    BlackjackSuite,
    ConversationSuite,
    DermatologyPanel,
    EchoSuite,
    EZPointsSuite,
    NumberLineSuite,
    Points24Suite,
    RecognitionSuite,
    SearchSuite,
    SokobanSuite,
    TextWorldSuite,
    WebSuite,
)
from lit_agentrl.types import EnvironmentSuite
from search_parts import Library, write_questions

FEW = {"num_train": 6, "num_val": 3, "num_test": 3}


def questions() -> str:
    """A file of 60 questions in the run's temporary folder."""
    records = [{"id": str(n), "question": f"What is {n}?", "golden_answers": [f"number {n}"]} for n in range(60)]
    return write_questions(Path(os.environ["LIT_AGENTRL_CACHE"]), records, "suites.jsonl")


SUITES = {
    "echo": EchoSuite,
    "textworld": lambda: TextWorldSuite(**FEW),
    "textworld, hard": lambda: TextWorldSuite(level="hard", **FEW),
    "sokoban": lambda: SokobanSuite(**FEW),
    "sokoban, pictures": lambda: SokobanSuite(observation="image", **FEW),
    "number line": NumberLineSuite,
    "ezpoints": EZPointsSuite,
    "points24": Points24Suite,
    "blackjack": BlackjackSuite,
    "search": lambda: SearchSuite(questions(), Library()),
    "dermatology": lambda: RecognitionSuite(Pixels()),
    "dermatology, words": lambda: ConversationSuite(Pixels()),
    "dermatology, both": lambda: DermatologyPanel(RecognitionSuite(Pixels()), ConversationSuite(Pixels())),
    "web": lambda: WebSuite(questions(), Library()),
}


@pytest.fixture(params=SUITES.values(), ids=SUITES.keys())
def suite(request) -> EnvironmentSuite:
    return request.param()


def test_no_task_is_in_two_splits(suite):
    panels = [list(suite.tasks(split)) for split in ("train", "val", "test")]
    assert all(panels)
    assert len({task for panel in panels for task in panel}) == sum(map(len, panels))


def test_a_task_starts_the_same_every_time_and_in_every_process(suite):
    """A worker process gets the suite pickled, before or after the tasks were counted."""
    twin = pickle.loads(pickle.dumps(suite))
    for split in ("test", "train"):
        assert list(twin.tasks(split)) == list(suite.tasks(split))
    task = suite.tasks("train")[0]
    starts = [made.make(task).reset() for made in (suite, suite, twin, pickle.loads(pickle.dumps(suite)))]
    assert len({(start.text, start.system, start.state, start.actions) for start in starts}) == 1
    assert len({tuple(image.tobytes() for image in start.images) for start in starts}) == 1
    anchors = [made.make(task) for made in (suite, twin)]
    for environment in anchors:
        environment.reset()
    assert anchors[0].anchor == anchors[1].anchor
    assert hash(anchors[0].anchor) == hash(anchors[1].anchor)


def test_nonsense_is_answered_and_not_valid(suite):
    """Whatever a policy says is an answer: never an exception, never a reward, never a success."""
    environment = suite.make(suite.tasks("train")[0])
    environment.reset()
    for reply in ("", "\n", "xyzzy plugh", "<action>", "🙂" * 50):
        observation, reward, done = environment.step(reply)
        assert not environment.success
        if isinstance(suite, EchoSuite):  # there every word is an answer
            break
        assert observation.valid is False
        assert reward <= 0
        if done:
            break
