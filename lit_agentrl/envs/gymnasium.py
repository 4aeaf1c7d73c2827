"""Others' environments of the Gymnasium interface, unmodified: what they show as text, what the policy says as actions.

Gymnasium (Towers et al. 2024, arXiv:2407.17032) is the interface that most single-agent environments are written to.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np

from lit_agentrl.envs.actions import ActionFormat, check_action_format, format_hint, parse_action
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.seeded import SeededTasks
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import EnvironmentSuite, Observation, Split

View = Literal["observation", "ansi", "image"]
_RENDER_MODES: dict[View, str | None] = {"observation": None, "ansi": "ansi", "image": "rgb_array"}
_HIGHLIGHTED = re.compile(r"\x1b\[4\d(?:;\d+)*m([^\x1b\n]*)\x1b\[0m")  # a background colour, up to its end
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class GymnasiumSuite(EnvironmentSuite):
    """A registered Gymnasium environment whose observations can be read and whose actions can be said.

    Task `train-3` is an episode reset with a seed of its own; the splits' seeds never meet. Whether two seeds start in
    the same state is the environment's affair.

    Args:
        env_id: As in `gymnasium.make`; `module:Name-v0` imports `module` first.
        options: Further arguments of `gymnasium.make`.
        instructions: What the system prompt says about the task. Offered actions and how to answer are added.
        actions: The names of a discrete space's actions, in order; without them they are called by their numbers.
            Not for a `Text` space, where the reply itself is the action.
        view: What the policy sees: the `observation` as text (a mapping as one line a key), what the environment draws
            as text (`ansi`; what it highlights stands in brackets), or its picture (`image`).
        success_key: The entry of `info` that says whether the task is solved. Without one, an episode that ended (not
            only ran out of time) with a positive last reward is solved.
        max_steps: Steps until Gymnasium truncates the episode; None for the environment's own limit.
        num_train: Training tasks.
        num_val: Validation tasks.
        num_test: Test tasks.
        action_format: What a reply has to look like.

    Raises:
        UserError: Gymnasium is missing, there is no such environment, or its actions or observations cannot be said.
    """

    def __init__(
        self,
        env_id: str,
        options: dict[str, Any] | None = None,
        instructions: str = "",
        actions: Sequence[str] = (),
        view: View = "observation",
        success_key: str | None = None,
        max_steps: int | None = None,
        num_train: int = 1024,
        num_val: int = 64,
        num_test: int = 128,
        action_format: ActionFormat = "plain",
    ) -> None:
        check_action_format(action_format)
        if view not in _RENDER_MODES:
            raise UserError(f"view={view!r} is unknown; allowed are {', '.join(_RENDER_MODES)}.")
        if max_steps is not None and max_steps < 1:
            raise UserError(f"max_steps={max_steps}: an episode needs at least 1 step, or null for its own limit.")
        self.env_id, self.options, self.instructions = env_id, dict(options or {}), instructions
        self.view, self.success_key, self.max_steps = view, success_key, max_steps
        self.action_format = action_format
        self._tasks = SeededTasks(num_train, num_val, num_test)
        first = self._new()
        self.actions = _action_names(env_id, first.action_space, actions)
        """The offered actions; None where any text is an action."""
        first.close()

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's tasks, by number."""
        return self._tasks.ids(split)

    def make(self, task: str) -> GymnasiumEnvironment:
        """An episode of the task's seed."""
        _, seed = self._tasks.seed(task)
        return GymnasiumEnvironment(self, self._new(), seed)

    def _new(self) -> Any:
        try:
            gymnasium = import_module("gymnasium")
        except ImportError as error:
            raise missing_extra("gymnasium", "gymnasium", "GymnasiumSuite") from error
        mode = _RENDER_MODES[self.view]
        asked = {"max_episode_steps": self.max_steps, "render_mode": mode}
        given = self.options | {name: value for name, value in asked.items() if value is not None}
        try:
            # The checker warns about habits of others' code; they are not ours to mend.
            made = gymnasium.make(self.env_id, disable_env_checker=True, **given)
        except gymnasium.error.Error as error:
            raise UserError(f"env_id={self.env_id!r}: Gymnasium cannot make it: {error}") from error
        except (ModuleNotFoundError, TypeError) as error:
            raise UserError(
                f"env_id={self.env_id!r} with options={self.options}: {error}. Install the package that brings the "
                "environment, and check its options."
            ) from error
        if mode and mode not in made.metadata.get("render_modes", ()):
            allowed = made.metadata.get("render_modes", [])
            raise UserError(f"view={self.view!r}: {self.env_id} draws {allowed} only. Use view='observation'.")
        return made


class GymnasiumEnvironment:
    """One episode.

    Args:
        suite: How to read and answer it.
        inner: The Gymnasium environment.
        seed: What it is reset with.
    """

    def __init__(self, suite: GymnasiumSuite, inner: Any, seed: int) -> None:
        self.suite, self.inner, self.seed = suite, inner, seed
        self._state = ""
        self._success = False

    def reset(self) -> Observation:
        """The first observation, and the actions in the system prompt."""
        observation, info = self.inner.reset(seed=self.seed)
        self._success = self._reads_solved(info, default=False)
        shown = self._show(observation, None)
        names = self.suite.actions
        offer = f"Actions: {', '.join(names)}." if names else ""
        shown.system = " ".join(filter(None, [self.suite.instructions, offer, format_hint(self.suite.action_format)]))
        return shown

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The environment's answer; a reply that is no action changes nothing and is not valid."""
        choice = self._choice(action)
        if choice is None:
            return Observation(f"That is not an action.\n{self._state}", state=self._state, valid=False), 0.0, False
        observation, reward, terminated, truncated, info = self.inner.step(choice)
        self._success = self._reads_solved(info, default=bool(terminated) and float(reward) > 0)
        return self._show(observation, True), float(reward), bool(terminated or truncated)

    @property
    def anchor(self) -> Hashable:
        """What is shown: what else the environment knows cannot be asked for."""
        return self._state

    @property
    def success(self) -> bool:
        """Whether the task is solved."""
        return self._success

    def close(self) -> None:
        """Free what the environment holds."""
        self.inner.close()

    def _choice(self, reply: str) -> Any:
        """The action in the environment's terms; None where the reply is none."""
        names = self.suite.actions
        if names is None:
            text = parse_action(reply, self.suite.action_format)
            return text if text is not None and self.inner.action_space.contains(text) else None
        name = choose(reply, names, self.suite.action_format)
        return None if name is None else int(getattr(self.inner.action_space, "start", 0)) + names.index(name)

    def _show(self, observation: Any, valid: bool | None) -> Observation:
        view = self.suite.view
        self._state = plain_text(self.inner.render()) if view == "ansi" else as_text(observation)
        images = (np.asarray(self.inner.render(), np.uint8),) if view == "image" else ()
        return Observation(
            self._state, state=self._state, actions=tuple(self.suite.actions or ()), valid=valid, images=images
        )

    def _reads_solved(self, info: Mapping[str, Any], default: bool) -> bool:
        key = self.suite.success_key
        return bool(info.get(key, False)) if key else default


def as_text(observation: Any) -> str:
    """An observation in words: text as it is, a mapping as one line a key, numbers and arrays as Python prints them."""
    if isinstance(observation, Mapping):
        return "\n".join(f"{key}: {as_text(value)}" for key, value in observation.items())
    if isinstance(observation, np.ndarray):
        return str(observation.tolist())
    if isinstance(observation, list | tuple):
        return ", ".join(as_text(value) for value in observation)
    return str(observation)


def plain_text(drawn: Any) -> str:
    """What was drawn for a terminal, without colours: a highlighted place, often the player's, stands in brackets."""
    return _COLOUR.sub("", _HIGHLIGHTED.sub(r"[\1]", str(drawn))).strip("\n")


def _action_names(env_id: str, space: Any, given: Sequence[str]) -> list[str] | None:
    """The names that actions are called by, checked; None where the reply itself is the action."""
    kind = type(space).__name__
    if kind == "Text" and not given:
        return None
    if kind != "Discrete":
        raise UserError(
            f"{env_id} takes {kind} actions, which have no names. Wrap it so that its action space is Discrete or Text."
        )
    names = [name.lower().strip() for name in given] or [str(number) for number in range(int(space.n))]
    if len(names) != int(space.n) or len(set(names)) != len(names):
        raise UserError(f"actions={list(given)}: {env_id} has {int(space.n)} actions; give each a different name.")
    return names
