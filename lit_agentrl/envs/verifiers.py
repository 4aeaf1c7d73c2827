"""Environments of the package `verifiers` (its v1 interface), unmodified: a taskset, and a program that plays it.

Nobody steps such an environment: its harness runs a program that asks a model. So it is played as any agent program
(`lit_agentrl.envs.program`), with the policy's chat endpoint as the model.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import islice
from typing import Any

from lit_agentrl.envs.program import History, ProgramResult, ProgramSuite
from lit_agentrl.envs.seeded import SEEDS_PER_SPLIT, SPLITS, SeededTasks
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import Split

DRAWS_PER_TASK = 10  # how often an endless taskset may repeat itself before it is said to be too small
log = logging.getLogger(__name__)


class VerifiersSuite(ProgramSuite):
    """The tasks of a `verifiers` taskset: the first `num_train` are for training, the next ones for val, then test.

    A task that repeats the content of an earlier one is left out, so no split holds a task of another.

    Args:
        taskset: Its id: an installed module that exports a `Taskset`, and with it an `Env` where it needs one.
        options: The taskset's own options.
        config: The rest of `verifiers`' environment block, as `{id: ..., agent: {max_turns: 8}}`. The `role` defaults
            to the harness `null`, a chat without tools, in a subprocess of this machine; in `verifiers` itself it would
            be a harness with a shell, in a paid sandbox.
        role: Which of the environment's agents the policy is. Others need a `client` and a `model` in `config`.
        success_reward: A reward of at least this solves the task.
        num_train: Training tasks.
        num_val: Validation tasks.
        num_test: Test tasks.
        history: As in `ProgramSuite`.
        seconds: As in `ProgramSuite`; the first episode may have packages installed for the harness.

    Raises:
        UserError: `verifiers` or `uv` is missing, or an option is out of range or unknown to it.
    """

    def __init__(
        self,
        taskset: str,
        options: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        role: str = "agent",
        success_reward: float = 1.0,
        num_train: int = 1024,
        num_val: int = 64,
        num_test: int = 128,
        history: History = "append",
        seconds: float = 50.0,
    ) -> None:
        super().__init__(history, seconds)
        self.taskset, self.role, self.success_reward = taskset, role, success_reward
        given = dict(config or {})
        player = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}} | dict(given.get(role) or {})
        self.block = given | {"taskset": {**(options or {}), "id": taskset}, role: player}
        """The environment block that `verifiers` is given."""
        self._tasks = SeededTasks(num_train, num_val, num_test)
        self._loaded: list[Any] | None = None
        self._lock = threading.Lock()
        self._check()

    def tasks(self, split: Split) -> Sequence[str]:
        """The split's tasks, by number.

        Raises:
            UserError: The taskset has too few tasks.
        """
        self._load()
        return self._tasks.ids(split)

    def run(self, task: str, base_url: str) -> ProgramResult:
        """One episode, its reward and success from the trace of the policy's role.

        Raises:
            RuntimeError: It failed; the text is what `verifiers` recorded.
        """
        split, seed = self._tasks.seed(task)
        counts = [len(self._tasks.ids(earlier)) for earlier in SPLITS[: SPLITS.index(split)]]
        chosen = self._load()[sum(counts) + seed % SEEDS_PER_SPLIT]
        episode = asyncio.run_coroutine_threadsafe(self._play(chosen, base_url), _loop()).result()
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if not episode.ok:
            said = "; ".join(f"{error.type}: {error.message}" for error in errors)
            raise RuntimeError(f"verifiers' episode of {task} failed: {said or 'it does not say why'}")
        traces = [trace for trace in episode.traces if trace.agent.name == self.role]
        if len(traces) != 1:
            raise RuntimeError(f"role={self.role!r} played {len(traces)} times in {task}; it must play once")
        reward = float(traces[0].reward)
        return ProgramResult(reward, reward >= self.success_reward)

    async def _play(self, task: Any, base_url: str) -> Any:
        """An episode with servers of its own: `verifiers` keeps a client for every address it ever served."""
        vf = _import()
        environment = vf.load_environment(self._config())
        client = vf.EvalClientConfig(base_url=base_url, api_key_var="LIT_AGENTRL_NO_KEY")
        async with environment.serving():
            return await environment.run_episode(task, vf.ModelContext(model="policy", client=client))

    def _config(self) -> Any:
        return self._resolve(self.block)

    def _resolve(self, block: Mapping[str, Any]) -> Any:
        try:
            return _import().resolve_env_config(dict(block))
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # pydantic's are ValueErrors
            raise UserError(f"taskset={self.taskset!r}: verifiers does not take it: {error}") from error

    def _check(self) -> None:
        agent = _import().AgentConfig
        plain = self._resolve({name: value for name, value in self.block.items() if name != self.role})
        known = [name for name, value in plain if isinstance(value, agent)]
        if self.role not in known:
            raise UserError(f"role={self.role!r}: {self.taskset} is played by {', '.join(known)}.")
        roles = {name: value for name, value in self._config() if isinstance(value, agent)}
        unserved = [name for name, value in roles.items() if name != self.role and value.client is None]
        if unserved:
            raise UserError(
                f"config: {', '.join(unserved)} would be played by the policy too. Give each a `client` and a `model`."
            )
        if roles[self.role].runtime.type == "subprocess" and not shutil.which("uv"):
            raise UserError(
                "VerifiersSuite: verifiers starts its programs with `uv`, which is not on the PATH, and would download "
                "an installer. Install it: pip install uv"
            )

    def _load(self) -> list[Any]:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._distinct()
            return self._loaded

    def _distinct(self) -> list[Any]:
        wanted = sum(len(self._tasks.ids(split)) for split in SPLITS)
        taskset = _import().load_environment(self._config()).taskset
        found: dict[str, Any] = {}
        num_drawn = 0
        for task in islice(taskset, wanted * DRAWS_PER_TASK):
            num_drawn += 1
            found.setdefault(task.data.model_dump_json(exclude={"idx"}), task)
            if len(found) == wanted:
                break
        if len(found) < wanted:
            raise UserError(
                f"num_train + num_val + num_test = {wanted}: {self.taskset} has {len(found)} different tasks among its "
                f"first {num_drawn}. Ask for fewer."
            )
        if num_drawn > wanted:
            log.info("%s: %d tasks left out that repeat others", self.taskset, num_drawn - wanted)
        return list(found.values())

    def __getstate__(self) -> Mapping[str, Any]:
        """What a worker process needs: it loads the tasks itself."""
        return {**vars(self), "_loaded": None, "_lock": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """In the worker."""
        vars(self).update(state)
        self._lock = threading.Lock()


def _import() -> Any:
    try:
        return import_module("verifiers.v1")
    except ImportError as error:
        raise missing_extra("verifiers", "verifiers", "VerifiersSuite") from error


_loops: list[asyncio.AbstractEventLoop] = []
_loops_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all episodes: `verifiers` holds locks of the process that may belong to one loop only."""
    with _loops_lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
            _loops.append(loop)
        return _loops[0]
