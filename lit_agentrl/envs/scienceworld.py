"""ScienceWorld (Wang et al. 2022, arXiv:2203.07540): primary-school science in a simulated house, in words.

The simulator is a Java program that plays one episode at a time, needs some 230 MB and a second to start. A few of them
are shared: an episode that lost its simulator to another gets it back, or another one, by playing its actions again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Hashable, Sequence
from importlib import import_module
from typing import Any, Literal

from lit_agentrl.envs.actions import ActionFormat, as_reply, check_action_format, format_hint, parse_action
from lit_agentrl.envs.scienceworld_servers import Servers
from lit_agentrl.envs.seeded import refuse_held_out
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import Conversation, Observation, Split, WalkthroughSuite

UNKNOWN = "No known action matches that input."
_VARIATIONS: dict[Split, str] = {
    "train": "get_variations_train",
    "val": "get_variations_dev",
    "test": "get_variations_test",
}


class ScienceWorldSuite(WalkthroughSuite):
    """The 30 tasks of ScienceWorld in the variations that its authors put into train, dev (`val`) and test.

    Task `boil/3` is variation 3 of `boil`. The order in which the simulator lists things is not always the same; what
    is there is.

    Args:
        names: The tasks to play; None for all 30.
        max_variations: The first so many variations of each task in each split; None for all.
        simplifications: What the simulator makes easier, comma-separated, as `easy` or `teleportAction`; empty for the
            full game.
        reward: `progress` pays what each action adds to the score, 1 in all; `success` pays 1 for a full score.
        max_servers: Simulators at a time. With more episodes side by side than that, actions are played again whenever
            an episode's simulator was given away (counted in `num_replayed`).
        action_format: What a reply has to look like.

    Raises:
        UserError: The package or Java is missing, or an option is out of range.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        max_variations: int | None = None,
        simplifications: str = "easy",
        reward: Literal["progress", "success"] = "progress",
        max_servers: int = 8,
        action_format: ActionFormat = "plain",
    ) -> None:
        check_action_format(action_format)
        if reward not in ("progress", "success"):
            raise UserError(f"reward={reward!r} is unknown; allowed are progress, success.")
        if max_servers < 1 or (max_variations is not None and max_variations < 1):
            raise UserError(
                f"max_servers={max_servers}, max_variations={max_variations}: both must be at least 1 "
                "(max_variations=null for all)."
            )
        _check_installed()
        known = [name for _, name in sorted(import_module("scienceworld.constants").ID2TASK.items())]
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            raise UserError(f"names={unknown}: no such tasks. ScienceWorld has {', '.join(known)}.")
        self.names = list(names or known)
        self.max_variations, self.simplifications = max_variations, simplifications
        self.reward, self.action_format = reward, action_format
        self.servers = Servers(max_servers)
        self._panels: dict[Split, list[str]] = {}

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's variations of every task."""
        if split not in self._panels:
            with self.servers.borrowed(None) as server:
                self._panels[split] = [
                    f"{name}/{v}" for name in self.names for v in self._variations(server, name, split)
                ]
        return self._panels[split]

    def make(self, task: str) -> ScienceWorldEnvironment:
        """An episode of the task's variation."""
        name, _, variation = task.partition("/")
        if name not in self.names or not variation.isdecimal():
            raise UserError(f"task={task!r} is not a task of this suite; a task looks like '{self.names[0]}/0'.")
        return ScienceWorldEnvironment(self, name, int(variation))

    def kind(self, task: str) -> str:
        """The task's name, without its variation."""
        return task.partition("/")[0]

    def walkthrough(self, task: str) -> Conversation:
        """The simulator's own solution.

        Raises:
            UserError: The task is held out, or the solution does not reach a full score.
        """
        if task not in self.tasks("train"):
            refuse_held_out(task, allowed=False)
        environment = self.make(task)
        with self.servers.borrowed(None) as server:
            server.load(environment.name, environment.variation, self.simplifications, generateGoldPath=True)
            actions = list(server.get_gold_action_sequence())
        observation, turns = environment.reset(), []
        for action in actions:
            reply = as_reply(action, self.action_format)
            turns.append((observation, reply))
            observation, _, done = environment.step(reply)
            if done:
                break
        environment.close()
        if not environment.success:
            raise UserError(f"The simulator's solution of {task} ends at a score of {environment.score:.2f} of 1.")
        return turns

    def _variations(self, server: Any, name: str, split: Split) -> list[int]:
        server.load(name, 0, self.simplifications)
        return list(getattr(server, _VARIATIONS[split])())[: self.max_variations]


class ScienceWorldEnvironment:
    """One episode: a task, a variation and the actions so far, which are its whole state.

    Args:
        suite: How to play and pay it, and its simulators.
        name: The task.
        variation: Its variation.
    """

    def __init__(self, suite: ScienceWorldSuite, name: str, variation: int) -> None:
        self.suite, self.name, self.variation = suite, name, variation
        self.played: list[str] = []
        self.score = 0.0
        """Of 1; negative after a mistake that cannot be mended."""
        self.num_replayed = 0
        """Actions played again because the simulator was given away meanwhile."""
        self._anchor: Hashable = None

    def reset(self) -> Observation:
        """The task, the room, and what one can do in general."""
        with self.suite.servers.borrowed(self) as server:
            self._load(server)
            task = str(server.server.freeActionTaskDesc()).replace("Task Description:\n", "").strip()
            room = str(server.server.freeActionLook()).strip()
            verbs = ", ".join(sorted(server.get_possible_actions()))
            self._anchor = self._state(server)
        system = f"Do the task step by step. Kinds of actions (OBJ is a thing): {verbs}."
        return Observation(
            f"{task}\n{room}", f"{system} {format_hint(self.suite.action_format)}", state=room, task=task
        )

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """What the simulator says; what it does not understand is not valid, but time goes on in it."""
        said = parse_action(action, self.suite.action_format)
        if said is None:
            return Observation(UNKNOWN, state=UNKNOWN, valid=False), 0.0, False
        with self.suite.servers.borrowed(self) as server:
            self._catch_up(server)
            text = str(server.server.step(said)).strip()
            self.played.append(said)
            before, self.score = self.score, float(server.server.getScore())
            done = bool(server.server.getCompleted()) or self.score < 0
            self._anchor = self._state(server)
        gain = max(0.0, self.score) - max(0.0, before)
        pay = gain if self.suite.reward == "progress" else float(self.success)
        return Observation(text, state=text, valid=text != UNKNOWN), pay, done

    @property
    def anchor(self) -> Hashable:
        """The room, what is carried and the score, whatever the order they are listed in."""
        return self._anchor

    @property
    def success(self) -> bool:
        """Whether the score is full."""
        return self.score >= 1.0

    @property
    def metrics(self) -> dict[str, float]:
        """The score, and how many actions had to be played again."""
        return {"score": max(0.0, self.score), "replayed": float(self.num_replayed)}

    def snapshot(self) -> object:
        """The actions so far."""
        return tuple(self.played), self.score, self._anchor

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot; its actions are played again when the next one comes."""
        assert isinstance(snapshot, tuple)
        played, self.score, self._anchor = snapshot
        self.played = list(played)
        self.suite.servers.forget(self)

    def close(self) -> None:
        """Leave the simulator to others."""
        self.suite.servers.forget(self)

    def _load(self, server: Any) -> None:
        server.load(self.name, self.variation, self.suite.simplifications)
        server.reset()

    def _catch_up(self, server: Any) -> None:
        """Bring a simulator that played something else to this episode's state."""
        if self.suite.servers.holds(server, self):
            return
        self._load(server)
        for action in self.played:
            server.server.step(action)
        self.num_replayed += len(self.played)
        if self._state(server) != self._anchor:
            raise RuntimeError(f"{self.name}/{self.variation}: playing its {len(self.played)} actions again differs.")

    @staticmethod
    def _state(server: Any) -> Hashable:
        simulator = server.server
        words = (simulator.freeActionLook(), simulator.freeActionInventory())
        return *(tuple(sorted(re.split(r"\s*[\n,]\s*", str(text)))) for text in words), float(simulator.getScore())


def _check_installed() -> None:
    try:
        import_module("scienceworld")
    except ImportError as error:
        raise missing_extra("scienceworld", "scienceworld", "ScienceWorldSuite") from error
    if not shutil.which("java"):
        raise UserError(
            "ScienceWorldSuite plays a Java program, and there is no `java` on the PATH. Install a Java runtime, "
            "version 8 or newer (Debian: apt install default-jre-headless; conda: openjdk)."
        )
