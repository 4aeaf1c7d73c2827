"""The echo environment, and that it meets the protocols as an example should."""

import pytest

from lit_agentrl.envs.toy import EchoSuite
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment


def test_splits_share_no_word():
    splits = [EchoSuite().tasks(split) for split in ("train", "val", "test")]
    assert [len(words) for words in splits] == [60, 15, 15]
    assert len({word for words in splits for word in words}) == 90


def test_saying_the_word_twice_succeeds():
    environment = EchoSuite().make("bade")
    assert isinstance(environment, RestorableEnvironment)
    assert environment.reset().text == "Say the word: bade"
    observation, reward, done = environment.step(" bade\n")
    assert (observation.text, reward, done, environment.success) == ("Say it again.", 0.5, False, False)
    saved = environment.snapshot()
    _, reward, done = environment.step("bad")
    assert (reward, done, environment.success) == (3 / 8, True, False)
    environment.restore(saved)
    _, _, done = environment.step("bade")
    assert (done, environment.success) == (True, True)


def test_anchor_is_the_word_and_the_turn():
    one, two, other = EchoSuite().make("bade"), EchoSuite().make("bade"), EchoSuite().make("bafi")
    assert one.anchor == two.anchor != other.anchor
    one.step("x")
    assert one.anchor != two.anchor
    two.step("y")
    assert one.anchor == two.anchor


def test_walkthrough_succeeds():
    turns = EchoSuite().walkthrough("bade")
    assert [observation.text for observation, _ in turns] == ["Say the word: bade", "Say it again."]
    environment = EchoSuite().make("bade")
    environment.reset()
    assert sum(environment.step(reply)[1] for _, reply in turns) == 1.0
    assert environment.success is True


def test_unknown_word():
    with pytest.raises(UserError, match="banana"):
        EchoSuite().make("banana")


def test_the_task_stays_and_an_empty_reply_is_not_valid():
    environment = EchoSuite().make("bade")
    first = environment.reset()
    second, _, _ = environment.step(" \n")
    assert (first.task, first.state, first.valid) == ("Say the word: bade", "Say it now.", None)
    assert (second.task, second.state, second.valid) == (first.task, "Say it again.", False)
    assert environment.step("bade")[0].valid is True
