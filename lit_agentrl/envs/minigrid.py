"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2018, 2023): instructions in a grid world, in words or as a picture.

The packages give an array of codes; the words are ours: what is seen, how far ahead and to which side, nearest first.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Hashable, Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np

from lit_agentrl.envs.actions import ActionFormat, as_reply, check_action_format, format_hint
from lit_agentrl.envs.choices import choose
from lit_agentrl.envs.seeded import SEEDS_PER_SPLIT, SPLITS, refuse_held_out
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import Conversation, Observation, Split, WalkthroughSuite

log = logging.getLogger(__name__)

ACTIONS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
"""In the order of MiniGrid's action numbers; `done` (6) does nothing and is not offered."""
SYSTEM = (
    "You are an agent in a grid of rooms. You see what is in front of you. "
    f"Actions: {', '.join(ACTIONS)} (toggle opens what you face; a locked door needs the key in your hand)."
)
SEEDS_PER_TASK = 100  # tried for each task asked for, before the level is said to have no more different starts
_UNSEEN, _EMPTY, _FLOOR, _WALL = 0, 1, 3, 2
_HAS_STATE = 4  # a door: the only object whose third code says something


class MiniGridSuite(WalkthroughSuite):
    """A level of MiniGrid or BabyAI, in splits whose starting states all differ.

    Task `train-17` starts the level with a seed; a seed whose start (grid, agent and mission) another split has already
    is passed over, so no split holds another's game.

    Args:
        level: A registered id, as `BabyAI-GoToRedBall-v0` or `MiniGrid-DoorKey-5x5-v0`.
        observation: What the policy sees: words, or a picture of the view with the mission in words.
        reward: `success` pays 1 at the goal; `environment` pays MiniGrid's 1 - 0.9 steps / limit.
        num_train: Training tasks.
        num_val: Validation tasks.
        num_test: Test tasks.
        action_format: What a reply has to look like.

    Raises:
        UserError: MiniGrid is missing, there is no such level, or an option is out of range.
    """

    def __init__(
        self,
        level: str = "BabyAI-GoToRedBall-v0",
        observation: Literal["text", "image"] = "text",
        reward: Literal["success", "environment"] = "success",
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 128,
        action_format: ActionFormat = "plain",
    ) -> None:
        check_action_format(action_format)
        if observation not in ("text", "image"):
            raise UserError(f"observation={observation!r} is unknown; allowed are text, image.")
        if reward not in ("success", "environment"):
            raise UserError(f"reward={reward!r} is unknown; allowed are success, environment.")
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        for split, size in self.sizes.items():
            if size < 0:
                raise UserError(f"num_{split}={size}: must not be below 0.")
        self.level, self.observation, self.reward, self.action_format = level, observation, reward, action_format
        self._panels: dict[Split, list[str]] = {}
        self._starts: set[Hashable] = set()
        _make(level).close()

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's tasks, their seeds in the name."""
        with _COUNTING:
            for name in SPLITS[: SPLITS.index(split) + 1]:  # an earlier split's starts are passed over by later ones
                if name not in self._panels:
                    self._panels[name] = self._panel(name)
        return self._panels[split]

    def make(self, task: str) -> MiniGridEnvironment:
        """An episode of the task's seed."""
        return MiniGridEnvironment(_make(self.level), self._seed(task), self)

    def kind(self, task: str) -> str:
        """The level."""
        return self.level

    def walkthrough(self, task: str) -> Conversation:
        """The play of BabyAI's own planner.

        Raises:
            UserError: The task is held out, or the level has no planner or is not solved by it.
        """
        refuse_held_out(task, allowed=False)
        if not self.level.startswith("BabyAI-"):
            raise UserError(f"level={self.level!r}: only BabyAI levels come with a planner that shows a solution.")
        bot_of = import_module("minigrid.utils.baby_ai_bot").BabyAIBot
        environment = self.make(task)
        observation, turns, done, previous = environment.reset(), [], False, None
        bot = bot_of(environment.inner)
        while not done:
            previous = bot.replan(previous)
            reply = as_reply(ACTIONS[int(previous)], self.action_format)
            turns.append((observation, reply))
            observation, _, done = environment.step(reply)
        if not environment.success:
            raise UserError(f"BabyAI's planner does not solve {task} of {self.level}; choose another level.")
        return turns

    def _panel(self, split: Split) -> list[str]:
        chosen: list[str] = []
        own: set[Hashable] = set()
        inner, first = _make(self.level), SPLITS.index(split) * SEEDS_PER_SPLIT
        for seed in range(first, first + SEEDS_PER_TASK * max(1, self.sizes[split])):
            if len(chosen) == self.sizes[split]:
                break
            inner.reset(seed=seed)
            start = (inner.unwrapped.mission, state_of(inner))
            if start not in self._starts and start not in own:
                own.add(start)
                chosen.append(f"{split}-{seed - first}")
        self._starts |= own
        if len(chosen) < self.sizes[split]:
            raise UserError(
                f"{self.level} has too few different starts: {len(chosen)} of the {self.sizes[split]} asked for in the "
                f"{split} split. Ask for fewer, or choose a larger level."
            )
        return chosen

    def _seed(self, task: str) -> int:
        split, _, number = task.partition("-")
        if split not in SPLITS or task not in self.tasks(split):
            raise UserError(f"task={task!r} is not a task of this suite; the first is {self.tasks('train')[0]!r}.")
        return SPLITS.index(split) * SEEDS_PER_SPLIT + int(number)


_COUNTING = threading.Lock()


class MiniGridEnvironment:
    """One episode.

    Args:
        inner: The level, of the MiniGrid package.
        seed: What it starts from.
        suite: How to show and pay it.
    """

    def __init__(self, inner: Any, seed: int, suite: MiniGridSuite) -> None:
        self.inner, self.seed, self.suite = inner, seed, suite
        self.success = False
        self._view: dict[str, Any] = {}

    def reset(self) -> Observation:
        """The mission and what is seen."""
        self._view, _ = self.inner.reset(seed=self.seed)
        shown = self._show(None)
        shown.system = f"{SYSTEM} {format_hint(self.suite.action_format)}"
        return shown

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What is seen then; a reply that is no action costs nothing and is not valid."""
        name = choose(action, ACTIONS, self.suite.action_format)
        if name is None:
            return self._show(False), 0.0, False
        self._view, reward, terminated, truncated, _ = self.inner.step(ACTIONS.index(name))
        self.success = bool(terminated) and float(reward) > 0
        pay = float(reward) if self.suite.reward == "environment" else float(self.success)
        return self._show(True), pay, bool(terminated or truncated)

    @property
    def anchor(self) -> Hashable:
        """The whole grid, the agent's place and direction, and what it carries."""
        return state_of(self.inner)

    def snapshot(self) -> object:
        """A copy of the level."""
        return copy.deepcopy(self.inner), self.success, self._view

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this level."""
        assert isinstance(snapshot, tuple)
        inner, self.success, self._view = snapshot
        self.inner = copy.deepcopy(inner)

    def close(self) -> None:
        """Free what the level holds."""
        self.inner.close()

    def _show(self, valid: bool | None) -> Observation:
        task = f"Mission: {self._view['mission']}."
        carried = self.inner.unwrapped.carrying
        state = describe(self._view["image"], f"{carried.color} {carried.type}" if carried else "")
        images: tuple[np.ndarray[Any, np.dtype[np.uint8]], ...] = ()
        if self.suite.observation == "image":
            images, state = (np.asarray(self.inner.unwrapped.get_pov_render(tile_size=16), np.uint8),), ""
        text = f"{task}\n{state}".strip()
        return Observation(text, state=state, task=task, actions=ACTIONS, valid=valid, images=images)


def state_of(inner: Any) -> Hashable:
    """Everything that decides what happens next, as plain values: equal states are equal in every process."""
    level = inner.unwrapped
    carried = (level.carrying.type, level.carrying.color) if level.carrying else ()
    place = tuple(int(i) for i in level.agent_pos)
    return level.grid.encode().tobytes(), place, int(level.agent_dir), carried


def describe(view: np.ndarray[Any, np.dtype[np.uint8]], carried: str) -> str:
    """The view [W, H, 3] in words. The agent stands in the middle of the last row and looks towards row 0.

    Args:
        view: Object, colour and state codes by column and row; 0 where nothing can be seen.
        carried: What is in the agent's hand; empty for nothing.
    """
    constants = import_module("minigrid.core.constants")
    width, height = view.shape[:2]
    middle, last = width // 2, height - 1
    seen: list[tuple[int, int, str]] = []
    for column in range(width):
        for row in range(height):
            kind, colour, state = (int(code) for code in view[column, row])
            if kind in (_UNSEEN, _EMPTY, _FLOOR, _WALL) or (column, row) == (middle, last):
                continue
            words = [constants.IDX_TO_COLOR[colour], constants.IDX_TO_OBJECT[kind]]
            if kind == _HAS_STATE:
                words.insert(0, {index: name for name, index in constants.STATE_TO_IDX.items()}[state])
            ahead, side = last - row, column - middle
            seen.append((ahead + abs(side), side, f"{_article(words[0])} {' '.join(words)} {_place(ahead, side)}"))
    ahead_kind = int(view[middle, last - 1, 0])
    facing = "You face a wall." if ahead_kind == _WALL else ""
    listed = f"You see {', '.join(words for _, _, words in sorted(seen))}." if seen else "You see nothing."
    hand = f"You carry {_article(carried)} {carried}." if carried else ""
    return " ".join(filter(None, [listed, facing, hand]))


def _place(ahead: int, side: int) -> str:
    parts = [f"{ahead} ahead"] if ahead else []
    if side:
        parts.append(f"{abs(side)} to the {'left' if side < 0 else 'right'}")
    return " and ".join(parts)


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"


def _make(level: str) -> Any:
    try:
        import_module("minigrid")
        gymnasium = import_module("gymnasium")
    except ImportError as error:
        raise missing_extra("minigrid", "minigrid", "MiniGridSuite") from error
    if not level.startswith(("MiniGrid-", "BabyAI-")) or level not in gymnasium.registry:
        names = sorted(name for name in gymnasium.registry if name.startswith(("MiniGrid-", "BabyAI-")))
        near = [name for name in names if level.lower().rstrip("v0123456789-") in name.lower()][:5] or names[:5]
        raise UserError(f"level={level!r} is not one of the {len(names)} of MiniGrid, such as {', '.join(near)}.")
    # It prints every layout that it draws again.
    vars(import_module("minigrid.envs.babyai.core.roomgrid_level"))["print"] = lambda *words: log.debug("%s", words)
    return gymnasium.make(level, render_mode="rgb_array", disable_env_checker=True)
