"""Environments in processes of their own: for those that hold the interpreter lock, leak, or can crash.

A thread that hangs in C code while it holds the interpreter lock stops the whole trainer; a process can be killed. Each
worker process holds the environments of several episodes and answers one call at a time. One that misses the deadline
or dies is replaced; the other episodes it held are lost with it and counted as failed.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Hashable
from multiprocessing.connection import Connection
from typing import Any

from lit_agentrl.envs.pool import EnvironmentTimeoutError
from lit_agentrl.errors import UserError
from lit_agentrl.types import Environment, EnvironmentSuite, Observation

START_SECONDS = 120.0  # importing an environment's packages on a busy machine
GRACE_SECONDS = 10.0  # after the deadline a worker ends itself, where nobody is left to do it
# Workers share the cores; and a state's hash has to be the same in all of them.
WORKER_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


class EnvironmentProcessError(RuntimeError):
    """The environment raised in its process, or the process died."""


class ProcessHost:
    """Starts the environments of a suite in worker processes. May be used from several threads.

    Processes start with the first environment, and end with `close` or with this process.

    Args:
        suite: What starts environments; it is pickled to the workers.
        num_processes: Workers side by side.
        deadline_seconds: How long a call may take in its worker; None for no limit.

    Raises:
        UserError: The suite cannot be pickled, or an argument is out of range.
    """

    def __init__(self, suite: EnvironmentSuite, num_processes: int, deadline_seconds: float | None) -> None:
        if num_processes < 1:
            raise UserError(f"num_processes={num_processes}: environments need at least 1 process.")
        try:
            self._suite = pickle.dumps(suite)
        except Exception as error:
            raise UserError(
                f"{type(suite).__name__} cannot be sent to worker processes ({error}). Let it hold plain values until "
                "`make` is called, or set --data.workers threads."
            ) from error
        self.deadline_seconds = deadline_seconds
        self.num_replaced = 0
        """Workers killed or lost so far."""
        self._workers: list[_Worker | None] = [None] * num_processes
        self._lock = threading.Lock()
        self._made = 0

    def start(self) -> None:
        """Start a first worker, to see that it can be done.

        Raises:
            UserError: It cannot; the text says why.
        """
        try:
            self._least_loaded().start()
        except (EnvironmentProcessError, EnvironmentTimeoutError) as error:
            raise UserError(
                f"The environment does not start in a worker process: {error}. Define its class in a module that can "
                "be imported, or set --data.workers threads."
            ) from error

    def make(self, task: str) -> Environment:
        """A fresh environment for one episode of `task`, in the worker that holds the fewest."""
        worker = self._least_loaded()
        number, is_restorable = worker.make(task)
        return (RestorableProcessEnvironment if is_restorable else ProcessEnvironment)(worker, number)

    def close(self) -> None:
        """End all workers. The host may be used again."""
        with self._lock:
            for worker in self._workers:
                if worker is not None:
                    worker.kill()
            self._workers = [None] * len(self._workers)

    def _least_loaded(self) -> _Worker:
        with self._lock:
            for place, worker in enumerate(self._workers):
                if worker is not None and worker.is_lost:
                    self.num_replaced += 1
                    self._workers[place] = None
            free = next((place for place, worker in enumerate(self._workers) if worker is None), None)
            if free is not None:
                self._workers[free] = _Worker(self._suite, self.deadline_seconds)
            workers = [worker for worker in self._workers if worker is not None]
            return min(workers, key=lambda worker: worker.num_held)


class ProcessEnvironment:
    """One episode whose environment lives in a worker process."""

    def __init__(self, worker: _Worker, number: int) -> None:
        self._worker, self._number = worker, number
        self._anchor: Hashable = None
        self._success: bool | None = None
        self._metrics: dict[str, float] = {}

    def reset(self) -> Observation:
        """The first observation."""
        observation: Observation = self._call("reset")
        return observation

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The next observation, the reward of the action, and whether the episode is over."""
        result: tuple[Observation, float, bool] = self._call("step", action)
        return result

    @property
    def anchor(self) -> Hashable:
        """The state before the next action."""
        return self._anchor

    @property
    def success(self) -> bool | None:
        """Whether the task is solved so far."""
        return self._success

    @property
    def metrics(self) -> dict[str, float]:
        """The environment's own numbers."""
        return self._metrics

    def close(self) -> None:
        """Free what the episode holds; nothing where its worker is gone."""
        self._worker.release(self._number)

    def _call(self, name: str, argument: Any = None) -> Any:
        result, self._anchor, self._success, self._metrics = self._worker.call(name, self._number, argument)
        return result


class RestorableProcessEnvironment(ProcessEnvironment):
    """An episode that can be taken back to a saved state; snapshots travel between the processes."""

    def snapshot(self) -> object:
        """A value that `restore` accepts."""
        return self._worker.call("snapshot", self._number)

    def restore(self, snapshot: object) -> None:
        """Go back to the state of `snapshot`."""
        self._call("restore", snapshot)


class _Worker:
    """One worker process and the connection to it."""

    def __init__(self, suite: bytes, deadline_seconds: float | None) -> None:
        self.is_lost = False
        self.num_held = 0
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()
        self._made = 0
        grace = 0 if deadline_seconds is None else deadline_seconds + GRACE_SECONDS
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lit_agentrl.envs.worker", str(theirs.fileno()), str(grace)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | WORKER_VARIABLES | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(suite)
        self._is_started = False

    def start(self) -> None:
        """Wait until the worker has its suite.

        Raises:
            EnvironmentProcessError: It does not get it.
        """
        with self._lock:
            self._await_start()

    def _await_start(self) -> None:
        if not self._is_started:
            try:
                self._receive(START_SECONDS)
            except EnvironmentProcessError:
                self.kill()
                raise
            self._is_started = True

    def make(self, task: str) -> tuple[int, bool]:
        """The number of a new environment, and whether it can be restored."""
        with self._lock:
            self._made += 1
            number = self._made
            self.num_held += 1
        return number, self.call("make", number, task)

    def call(self, name: str, number: int, argument: Any = None) -> Any:
        """The result of a call in the worker.

        Raises:
            EnvironmentTimeoutError: It took longer than the deadline; the worker was killed.
            EnvironmentProcessError: The environment raised, or the worker is gone.
        """
        with self._lock:
            if self.is_lost:
                raise EnvironmentProcessError("its process was lost, with all the episodes it held")
            try:
                self._await_start()
                self._connection.send((name, number, argument))
                return self._receive(self._deadline_seconds)
            except (EOFError, OSError) as error:
                self.kill()
                code = self._process.wait()
                raise EnvironmentProcessError(f"its process ended with exit code {code}") from error

    def release(self, number: int) -> None:
        """Forget an environment."""
        with self._lock:
            self.num_held -= 1
        if not self.is_lost:
            self.call("close", number)

    def kill(self) -> None:
        """End the process at once."""
        self.is_lost = True
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _receive(self, seconds: float | None) -> Any:
        began = time.monotonic()
        if not self._connection.poll(seconds):
            self.kill()
            raise EnvironmentTimeoutError(
                f"no answer within {seconds:g} s; its process was killed", time.monotonic() - began
            )
        outcome, value, took = self._connection.recv()
        if outcome == "timeout":
            raise EnvironmentTimeoutError(value, took)
        if outcome == "error":
            raise EnvironmentProcessError(value)
        return value

    def __del__(self) -> None:
        """A host that is dropped leaves no process behind."""
        if not self.is_lost:
            self.kill()
