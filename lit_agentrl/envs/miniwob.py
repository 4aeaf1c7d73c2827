"""MiniWoB++ (Liu et al. 2018, arXiv:1802.08802): small web pages in a real browser, as a list of elements or a picture.

The pages come with the package and are opened from disk; nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np

from lit_agentrl.envs.actions import ActionFormat, check_action_format, format_hint, parse_action
from lit_agentrl.envs.miniwob_browsers import Browsers, find_browser
from lit_agentrl.envs.seeded import SeededTasks
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import EnvironmentSuite, Observation, Split

SYSTEM = (
    "You use a web page. Its elements are listed with their numbers. "
    "Actions: click NUMBER; type NUMBER TEXT (replaces nothing, adds TEXT to the field); press Enter."
)
_ACTION = re.compile(r"(click) +(\d+)|(type) +(\d+) +(\S.*)|(press) +(enter)", re.IGNORECASE)
# Kinds of elements that only hold others, or words.
_SILENT = {"body", "div", "table", "tbody", "tr", "form", "ul", "li", "p", "span", "label", "svg", "g"}


class MiniWoBSuite(EnvironmentSuite):
    """Pages of MiniWoB++, each with a one-sentence task that its seed draws.

    Task `click-test-2/train-5` is a page and a seed; the splits' seeds never meet, though some pages draw from few
    different tasks.

    Args:
        pages: Which, as `click-test-2`.
        observation: What the policy sees: `text` is the elements, `image` the page ([210, 160, 3]), `both` both.
        max_browsers: Browsers at a time, some 150 MB each: at least the episodes side by side.
        num_train: Training tasks of each page.
        num_val: Validation tasks of each page.
        num_test: Test tasks of each page.
        action_format: What a reply has to look like.

    Raises:
        UserError: The package or a browser with its driver is missing, or an option is out of range. The environment
            variables MINIWOB_CHROME_BINARY and MINIWOB_CHROMEDRIVER name them where they are not on the PATH.
    """

    def __init__(
        self,
        pages: Sequence[str] = ("click-test-2",),
        observation: Literal["text", "image", "both"] = "text",
        max_browsers: int = 16,
        num_train: int = 256,
        num_val: int = 32,
        num_test: int = 32,
        action_format: ActionFormat = "plain",
    ) -> None:
        check_action_format(action_format)
        if observation not in ("text", "image", "both"):
            raise UserError(f"observation={observation!r} is unknown; allowed are text, image, both.")
        if max_browsers < 1:
            raise UserError(f"max_browsers={max_browsers}: at least 1 is needed.")
        known = _known_pages()
        unknown = sorted(set(pages) - set(known))
        if unknown or not pages:
            raise UserError(f"pages={unknown or list(pages)}: MiniWoB++ has {', '.join(known)}.")
        find_browser()
        self.pages, self.observation, self.action_format = list(pages), observation, action_format
        self.browsers = Browsers(max_browsers)
        self._tasks = SeededTasks(num_train, num_val, num_test)

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's tasks of every page, one page after the other in turns."""
        return [f"{page}/{task}" for task in self._tasks.ids(split) for page in self.pages]

    def make(self, task: str) -> MiniWoBEnvironment:
        """An episode of the task's page and seed."""
        page, _, seeded = task.partition("/")
        if page not in self.pages:
            raise UserError(f"task={task!r} is not a task of this suite; a task looks like '{self.pages[0]}/train-0'.")
        return MiniWoBEnvironment(self, page, self._tasks.seed(seeded)[1])

    def kind(self, task: str) -> str:
        """The page."""
        return task.partition("/")[0]


class MiniWoBEnvironment:
    """One episode on a page; it holds a browser from `reset` to `close`.

    Args:
        suite: How to show it, and the browsers.
        page: Which page.
        seed: What its task is drawn from.
    """

    def __init__(self, suite: MiniWoBSuite, page: str, seed: int) -> None:
        self.suite, self.page, self.seed = suite, page, seed
        self.success = False
        self._inner: Any = None
        self._task = self._state = ""
        self._refs: set[int] = set()

    def reset(self) -> Observation:
        """The task and the page.

        Raises:
            RuntimeError: All browsers are in use.
        """
        self._inner = self.suite.browsers.take(self.page)
        seen, _ = self._inner.reset(seed=self.seed)
        self._task = f"Task: {seen['utterance']}"
        shown = self._show(seen, None)
        shown.system = f"{SYSTEM} {format_hint(self.suite.action_format)}"
        return shown

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The page after the action; one that cannot be done is not done and not valid.

        The reward is the page's own without its time discount, not below 0: 1 where the task is solved.
        """
        command = self._command(action)
        if command is None:
            last = self._state
            return (
                Observation(f"That cannot be done here.\n{last}", state=last, task=self._task, valid=False),
                0.0,
                False,
            )
        seen, _, done, _, info = self._inner.step(command)
        reward = max(0.0, float(info["raw_reward"])) if done else 0.0
        self.success = bool(done) and reward >= 1.0
        if done:
            return (
                Observation("The page has closed.", state="The page has closed.", task=self._task, valid=True),
                reward,
                True,
            )
        return self._show(seen, True), reward, False

    @property
    def anchor(self) -> Hashable:
        """The page and what is on it."""
        return self.page, self._task, self._state

    def close(self) -> None:
        """Leave the browser to others."""
        if self._inner is not None:
            self.suite.browsers.give_back(self.page, self._inner)
            self._inner = None

    def _command(self, reply: str) -> Any:
        """The action in the package's terms; None where it is none or its element is not there."""
        said = parse_action(reply, self.suite.action_format)
        found = _ACTION.fullmatch(said.strip()) if said else None
        if found is None:
            return None
        kinds = import_module("miniwob.action").ActionTypes
        click, clicked, write, field, text, _, _ = found.groups()
        if (click or write) and int(clicked or field) not in self._refs:
            return None
        create = self._inner.unwrapped.create_action
        if click:
            return create(kinds.CLICK_ELEMENT, ref=int(clicked))
        if write:
            return create(kinds.FOCUS_ELEMENT_AND_TYPE_TEXT, ref=int(field), text=text)
        keys = list(self._inner.unwrapped.action_space_config.allowed_keys)
        return create(kinds.PRESS_KEY, key=keys.index("<Enter>"))

    def _show(self, seen: Mapping[str, Any], valid: bool | None) -> Observation:
        self._refs = {int(element["ref"]) for element in seen["dom_elements"]}
        self._state = describe(seen["dom_elements"])
        with_text, with_image = self.suite.observation != "image", self.suite.observation != "text"
        images = (np.asarray(seen["screenshot"], np.uint8),) if with_image else ()
        text = f"{self._task}\n{self._state}" if with_text else self._task
        return Observation(text, state=self._state, task=self._task, valid=valid, images=images)


def describe(elements: Sequence[Mapping[str, Any]]) -> str:
    """A line for every element that says or does something: number, kind, words, content and whether it has focus."""
    words: dict[int, str] = {}
    for element in elements:
        ref, text = int(element["ref"]), str(element["text"]).strip()
        owner = int(element["parent"]) if ref < 0 else ref  # negative: bare words inside their parent
        words[owner] = " ".join(filter(None, [words.get(owner, ""), text]))
    return "\n".join(
        _line(element, words[ref])
        for element in elements
        if (ref := int(element["ref"])) > 0 and (words[ref] or element["tag"] not in _SILENT)
    )


def _line(element: Mapping[str, Any], words: str) -> str:
    value = str(element["value"]).strip()
    parts = [f"[{int(element['ref'])}] {element['tag']}", repr(words) if words else "", f"= {value!r}" if value else ""]
    is_focused = int(element["flags"][0]) and element["tag"] != "body"
    return " ".join(filter(None, [*parts, "(focused)" if is_focused else ""]))


def _known_pages() -> list[str]:
    try:
        gymnasium = import_module("gymnasium")
        gymnasium.register_envs(import_module("miniwob"))
    except ImportError as error:
        raise missing_extra("miniwob", "miniwob", "MiniWoBSuite") from error
    return sorted(
        name.removeprefix("miniwob/").removesuffix("-v1") for name in gymnasium.registry if name.startswith("miniwob/")
    )
