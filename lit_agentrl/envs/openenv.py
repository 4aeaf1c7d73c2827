"""Environments that are served by OpenEnv: one WebSocket session an episode, JSON messages to and fro.

This speaks OpenEnv's wire protocol (openenv-core 0.3) itself: its client library brings a web framework and an
interface builder along, and none of the environment's own code is needed, or run, on this side.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from lit_agentrl.envs.actions import ActionFormat, check_action_format, format_hint, parse_action
from lit_agentrl.envs.gymnasium import as_text
from lit_agentrl.envs.seeded import SeededTasks
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import EnvironmentSuite, Observation, Split

MAX_MESSAGE = 16 * 2**20  # bytes
BOOKKEEPING = {"done", "reward", "metadata"}  # fields of every OpenEnv observation that are not for the policy
CAPACITY = "CAPACITY_REACHED"


class OpenEnvSuite(EnvironmentSuite):
    """An environment behind a running OpenEnv server.

    Task `train-3` is a session reset with a seed of its own; servers that ignore seeds start as they like.

    Args:
        url: Of the server, as `http://localhost:8000`.
        action_field: Which field of the environment's action the policy's words go to, as `message` or `code`.
        action_values: The action's other fields, always the same.
        text_fields: The observation's fields to show; None for all but OpenEnv's own (done, reward, metadata).
        instructions: What the system prompt says about the task; how to answer is added.
        success_reward: An episode that ended with a last reward of at least this is solved; None where that says
            nothing.
        seconds: How long to wait for the server's answer.
        num_train: Training tasks.
        num_val: Validation tasks.
        num_test: Test tasks.
        action_format: What a reply has to look like.

    Raises:
        UserError: The package `websockets` is missing, or an option is out of range.
    """

    def __init__(
        self,
        url: str,
        action_field: str,
        action_values: dict[str, Any] | None = None,
        text_fields: Sequence[str] | None = None,
        instructions: str = "",
        success_reward: float | None = 1.0,
        seconds: float = 30.0,
        num_train: int = 1024,
        num_val: int = 64,
        num_test: int = 128,
        action_format: ActionFormat = "plain",
    ) -> None:
        check_action_format(action_format)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", "ws", "wss") or not parts.netloc:
            raise UserError(f"url={url!r} is no server's address; it looks like http://localhost:8000.")
        if not action_field or seconds <= 0:
            raise UserError(
                f"action_field={action_field!r}, seconds={seconds}: name a field, and wait a positive time."
            )
        try:
            import_module("websockets.sync.client")
        except ImportError as error:
            raise missing_extra("websockets", "openenv", "OpenEnvSuite") from error
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        self.url = f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}/ws"
        self.action_field, self.action_values = action_field, dict(action_values or {})
        self.text_fields, self.instructions = text_fields, instructions
        self.success_reward, self.seconds, self.action_format = success_reward, seconds, action_format
        self._tasks = SeededTasks(num_train, num_val, num_test)

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's tasks, by number."""
        return self._tasks.ids(split)

    def make(self, task: str) -> OpenEnvEnvironment:
        """A session of the task's seed; the server is asked when it is reset."""
        _, seed = self._tasks.seed(task)
        return OpenEnvEnvironment(self, seed)


class OpenEnvEnvironment:
    """One session.

    Args:
        suite: Where the server is and how to read it.
        seed: What the session is reset with.
    """

    def __init__(self, suite: OpenEnvSuite, seed: int) -> None:
        self.suite, self.seed = suite, seed
        self._socket: Any = None
        self._state = ""
        self.success: bool | None = None

    def reset(self) -> Observation:
        """The first observation.

        Raises:
            ConnectionError: There is no server, or it is full.
        """
        self._socket = self._connect()
        shown = self._show(self._ask("reset", {"seed": self.seed}), None)
        self.success = None if self.suite.success_reward is None else False
        shown.system = " ".join(filter(None, [self.suite.instructions, format_hint(self.suite.action_format)]))
        return shown

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The server's answer; a reply without an action is not sent and not valid.

        Raises:
            ConnectionError: The server failed or went away.
        """
        said = parse_action(action, self.suite.action_format)
        if said is None:
            return Observation(self._state, state=self._state, valid=False), 0.0, False
        answer = self._ask("step", self.suite.action_values | {self.suite.action_field: said})
        reward, done = float(answer.get("reward") or 0.0), bool(answer.get("done"))
        if self.suite.success_reward is not None:
            self.success = done and reward >= self.suite.success_reward
        return self._show(answer, True), reward, done

    @property
    def anchor(self) -> Hashable:
        """What is shown: what else the server knows cannot be compared."""
        return self._state

    def close(self) -> None:
        """End the session."""
        if self._socket is not None:
            self._socket.send(json.dumps({"type": "close"}))
            self._socket.close()

    def _connect(self) -> Any:
        try:
            return import_module("websockets.sync.client").connect(
                self.suite.url,
                open_timeout=self.suite.seconds,
                max_size=MAX_MESSAGE,
                proxy=None if urlsplit(self.suite.url).hostname in ("localhost", "127.0.0.1", "::1") else True,
            )
        except Exception as error:
            raise ConnectionError(f"no OpenEnv session at {self.suite.url}: {error}") from error

    def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(self._socket.recv(timeout=self.suite.seconds))
        except Exception as error:
            raise ConnectionError(f"{self.suite.url} did not answer {kind!r}: {error}") from error
        body: dict[str, Any] = answer.get("data", {})
        if answer.get("type") == "error":
            hint = " Raise the server's max_concurrent_envs." if body.get("code") == CAPACITY else ""
            raise ConnectionError(
                f"{self.suite.url} refused {kind!r}: {body.get('message')} ({body.get('code')}).{hint}"
            )
        return body

    def _show(self, answer: Mapping[str, Any], valid: bool | None) -> Observation:
        fields: Mapping[str, Any] = answer.get("observation") or {}
        chosen = self.suite.text_fields
        if chosen is None:
            chosen = [name for name in fields if name not in BOOKKEEPING]
        missing = [name for name in chosen if name not in fields]
        if missing:
            raise KeyError(f"text_fields={missing}: the server's observations have {', '.join(fields)}")
        shown = {name: fields[name] for name in chosen}
        self._state = as_text(next(iter(shown.values()))) if len(shown) == 1 else as_text(shown)
        return Observation(self._state, state=self._state, valid=valid)
