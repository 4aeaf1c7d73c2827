"""Runs many environments side by side, and survives those that raise or hang.

A thread that hangs can not be stopped in Python, only abandoned: it is a daemon (so that it never holds up the exit of
the process, as `concurrent.futures` would), it is counted, and another takes its place. An environment that hangs in C
code while it holds the interpreter lock stops everything; such an environment belongs in a process
(`lit_agentrl.envs.process`).
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from lit_agentrl.errors import UserError
from lit_agentrl.types import StopReason

T = TypeVar("T")


class EnvironmentTimeoutError(RuntimeError):
    """An environment kept a deadline of its own and missed it.

    Args:
        message: What was missed.
        seconds: How long the call ran.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(slots=True, frozen=True)
class EnvironmentFailure:
    """What became of a call that gave no result."""

    reason: StopReason
    """`ENV_ERROR` or `ENV_TIMEOUT`."""
    message: str
    """The error and where it was raised, or the deadline that was missed."""
    seconds: float
    """How long the call ran."""


@dataclass(slots=True, eq=False)
class _Call(Generic[T]):
    """One function to run, and how far it is. Changed under the pool's lock only."""

    index: int
    function: Callable[[], T]
    results: SimpleQueue[tuple[int, T | EnvironmentFailure]]
    started: float | None = None
    ended: bool = False
    """Finished, or given up."""


class EnvironmentPool:
    """Threads that make the calls of many environments side by side, each under a deadline.

    Results come in the order of the calls, whatever the order they end in, so they depend on the environments alone.
    May be used from several threads. Threads start with the first call.

    Args:
        num_workers: Calls that run at a time.
        deadline_seconds: How long a call may take from when it starts to run; None for no limit.

    Raises:
        UserError: An argument is not positive.
    """

    def __init__(self, num_workers: int = 8, deadline_seconds: float | None = 30.0) -> None:
        if num_workers < 1:
            raise UserError(f"num_workers={num_workers}: environments need at least 1 thread.")
        if deadline_seconds is not None and deadline_seconds <= 0:
            raise UserError(f"deadline_seconds={deadline_seconds}: give a positive number, or null for no limit.")
        self.num_workers = num_workers
        self.deadline_seconds = deadline_seconds
        self.num_leaked = 0
        """Threads abandoned so far, each with an environment that may still run."""
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_running = 0

    def call(self, calls: Sequence[Callable[[], T]]) -> list[T | EnvironmentFailure]:
        """The result of each call, in order; an `EnvironmentFailure` for one that raised or missed the deadline."""
        results: SimpleQueue[tuple[int, T | EnvironmentFailure]] = SimpleQueue()
        waiting = {index: _Call(index, function, results) for index, function in enumerate(calls)}
        answers: dict[int, T | EnvironmentFailure] = {}
        self._fill_up()
        for call in waiting.values():
            self._calls.put(call)
        try:
            while waiting:
                try:
                    index, answer = results.get(timeout=self._until_next_deadline(waiting.values()))
                except Empty:
                    for index in [index for index, call in waiting.items() if self._is_overdue(call)]:
                        seconds = self._give_up(waiting[index])
                        if seconds is not None:  # None: it finished just now, its result is there
                            answers[index] = self._timeout(seconds)
                            del waiting[index]
                else:
                    answers[index] = answer
                    del waiting[index]
        finally:
            # Interrupted: nobody waits for these any more, and one that hangs must not keep its place in the pool. The
            # last go first, as they have yet to start and the threads that replace the others would start them.
            for call in reversed(waiting.values()):
                self._give_up(call)
        return [answers[index] for index in range(len(calls))]

    def close(self) -> None:
        """Let the threads end once they are idle. The pool may be used again."""
        with self._lock:
            for _ in range(self._num_running):
                self._calls.put(None)
            # A new queue, so that threads started later do not take the old ones' notice.
            self._calls, self._num_running = SimpleQueue(), 0

    def _fill_up(self) -> None:
        with self._lock:
            while self._num_running < self.num_workers:
                self._start_thread()
                self._num_running += 1

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, args=(self._calls,), name="environment", daemon=True).start()

    def _work(self, calls: SimpleQueue[_Call[Any] | None]) -> None:
        while True:
            call = calls.get()
            if call is None or not self._run(call):
                return
            del call  # an idle thread must not keep the environment alive

    def _run(self, call: _Call[Any]) -> bool:
        """Make the call; False if it was given up meanwhile, as then another thread has taken this one's place."""
        with self._lock:
            if call.ended:
                return True
            call.started = time.monotonic()
        try:
            answer = call.function()
        except EnvironmentTimeoutError as error:
            answer = EnvironmentFailure(StopReason.ENV_TIMEOUT, str(error), error.seconds)
        except BaseException as error:  # SystemExit too: an environment must not end its thread unseen
            seconds = time.monotonic() - call.started
            answer = EnvironmentFailure(StopReason.ENV_ERROR, _describe(error), seconds)
        with self._lock:
            if call.ended:
                return False
            call.ended = True
            call.results.put((call.index, answer))
        return True

    def _give_up(self, call: _Call[Any]) -> float | None:
        """Stop waiting for a call, and replace its thread if it runs; the seconds it ran, None if it has ended."""
        with self._lock:
            if call.ended:
                return None
            call.ended = True
            if call.started is None:
                return 0.0
            self.num_leaked += 1
            self._start_thread()
            return time.monotonic() - call.started

    def _until_next_deadline(self, calls: Iterable[_Call[Any]]) -> float | None:
        """Seconds to the first deadline that can be missed; a call that has yet to start misses it later than now's."""
        if self.deadline_seconds is None:
            return None
        now = time.monotonic()
        first = min((call.started for call in calls if call.started is not None and not call.ended), default=now)
        return max(0.0, first + self.deadline_seconds - now)

    def _is_overdue(self, call: _Call[Any]) -> bool:
        limit = self.deadline_seconds
        return limit is not None and call.started is not None and time.monotonic() - call.started >= limit

    def _timeout(self, seconds: float) -> EnvironmentFailure:
        message = f"no answer within {self.deadline_seconds:g} s; its thread was abandoned"
        return EnvironmentFailure(StopReason.ENV_TIMEOUT, message, seconds)


def _describe(error: BaseException) -> str:
    """The error and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
