"""Web pages in a real browser: tasks are solved by what the list of elements says."""

import pickle
import re

import numpy as np
import pytest

from lit_agentrl.envs.miniwob import MiniWoBSuite, describe
from lit_agentrl.envs.miniwob_browsers import find_browser
from lit_agentrl.errors import UserError


def element(ref: int, tag: str, text: str = "", value: str = "", parent: int = 1, focused: int = 0) -> dict:
    return {
        "ref": ref,
        "parent": parent,
        "tag": tag,
        "text": text,
        "value": value,
        "flags": np.array([focused, 0, 0, 0]),
    }


def test_elements_in_words():
    """Containers are silent, bare words belong to their parent, fields show what is in them."""
    elements = [
        element(1, "body", focused=1),
        element(2, "div"),
        element(3, "label"),
        element(4, "input_checkbox", value="True", parent=3),
        element(-5, "t", "Select me", parent=3),
        element(6, "input_text", value="abc", focused=1),
        element(7, "button", "Submit"),
        element(8, "div", "Read this"),
    ]
    assert describe(elements).splitlines() == [
        "[3] label 'Select me'",
        "[4] input_checkbox = 'True'",
        "[6] input_text = 'abc' (focused)",
        "[7] button 'Submit'",
        "[8] div 'Read this'",
    ]


@pytest.fixture(scope="module")
def make_suite():
    """Suites over real browsers, which are closed in the end."""
    pytest.importorskip("miniwob", reason="pip install 'lit-agentrl[miniwob]'")
    try:
        find_browser()
    except UserError as error:
        pytest.skip(str(error))
    made = []

    def make(*pages: str, **options) -> MiniWoBSuite:
        made.append(MiniWoBSuite(pages, **options))
        return made[-1]

    yield make
    for suite in made:
        suite.browsers.close()


def number(state: str, kind: str, words: str = "") -> str:
    """The number of the first element of a kind, with these words."""
    return re.search(rf"\[(\d+)\] {kind}{f' {words!r}' if words else ''}", state).group(1)


def test_a_button_is_clicked(make_suite):
    suite = make_suite("click-test-2")
    environment = suite.make("click-test-2/train-0")
    first = environment.reset()
    wanted = re.search(r"Click button (\w+)\.", first.task).group(1)
    _, reward, done = environment.step(f"click {number(first.state, 'button', wanted)}")
    assert (reward, done, environment.success) == (1.0, True, True)
    environment.close()
    environment = suite.make("click-test-2/train-0")
    other = {"ONE": "TWO", "TWO": "ONE"}[wanted]
    _, reward, done = environment.step(f"click {number(environment.reset().state, 'button', other)}")
    assert (reward, done, environment.success) == (0.0, True, False)
    environment.close()


def test_a_field_is_filled_and_what_cannot_be_done_is_not(make_suite):
    environment = make_suite("enter-text", action_format="tagged").make("enter-text/val-1")
    first = environment.reset()
    word = re.search(r'"(.*?)"', first.task).group(1)
    field, button = number(first.state, "input_text"), number(first.state, "button")
    for reply in ("click 99", f"type 99 {word}", "wait", f"click {button} now"):
        assert environment.step(f"<action>{reply}</action>")[0].valid is False
    assert environment.step(f"click {button}")[0].valid is False  # no tags
    observation, _, _ = environment.step(f"<think>{word}</think><action>type {field} {word}</action>")
    assert f"= {word!r} (focused)" in observation.state
    assert environment.step(f"<action>click {button}</action>")[1:] == (1.0, True)
    environment.close()


def test_tasks_are_fixed_by_their_seeds_and_browsers_are_used_again(make_suite):
    suite = make_suite("click-test-2", "enter-text", max_browsers=1)
    shown = {}
    for task in [*suite.tasks("train")[:6], *suite.tasks("train")[:6]]:
        environment = suite.make(task)
        text = environment.reset().text
        assert shown.setdefault(task, text) == text
        environment.close()
    assert len(set(shown.values())) > 3
    assert suite.kind("enter-text/train-0") == "enter-text"
    assert suite.browsers._num == 1


def test_more_episodes_than_browsers_are_refused(make_suite):
    suite = make_suite("click-test-2", max_browsers=1)
    first = suite.make("click-test-2/train-0")
    first.reset()
    with pytest.raises(RuntimeError, match="max_browsers"):
        suite.make("click-test-2/train-1").reset()
    first.close()


def test_pictures_of_the_page(make_suite):
    environment = make_suite("click-test-2", observation="image").make("click-test-2/train-0")
    first = environment.reset()
    assert (first.images[0].shape, first.images[0].dtype) == ((210, 160, 3), np.uint8)
    assert first.text == first.task
    environment.close()


def test_the_suite_can_be_sent_to_a_process(make_suite):
    suite = make_suite("click-test-2")
    assert pickle.loads(pickle.dumps(suite)).tasks("val") == suite.tasks("val")


def test_mistakes_are_named_at_once(make_suite, monkeypatch):
    with pytest.raises(UserError, match="click-test-2"):
        make_suite("no-such-page")
    with pytest.raises(UserError, match="text, image, both"):
        make_suite("click-test-2", observation="sound")
    with pytest.raises(UserError, match="max_browsers=0"):
        make_suite("click-test-2", max_browsers=0)
    with pytest.raises(UserError, match="click-test-2/train-0"):
        make_suite("click-test-2").make("enter-text/train-0")
    monkeypatch.setenv("MINIWOB_CHROME_BINARY", "/no/such/browser")
    with pytest.raises(UserError, match="apt install chromium"):
        make_suite("click-test-2")
