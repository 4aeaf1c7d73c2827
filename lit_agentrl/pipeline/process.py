"""Runs stages one after another, each in a process of its own (fresh memory, fresh process group).

A finished one is skipped, an interrupted one resumes from its last checkpoint, a failed one leaves the command that
reproduces it.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from lit_agentrl.pipeline.stage import Stage

PATIENCE = 20.0
"""Seconds that a stage has to end after Ctrl-C: the terminal sent it to the stage as well, `kill -INT` did not."""


def run_all(stages: Sequence[Stage], after: Callable[[Stage], None] = lambda stage: None) -> None:
    """Run what is not finished, in order; `after` is called with each finished stage, skipped ones included.

    Raises:
        UserError: A folder holds a run with other options; seen before anything runs.
        SystemExit: A command failed, or Ctrl-C.
    """
    finished = [stage.is_finished() for stage in stages]
    for number, (stage, is_finished) in enumerate(zip(stages, finished, strict=True), 1):
        place = f"[{number}/{len(stages)}] {stage.name}"
        if is_finished:
            print(f"{place}: finished already, in {stage.run}", flush=True)
        else:
            stage.mark(finished=False)
            run_one(stage, place)
            stage.mark(finished=True)
        after(stage)


def run_one(stage: Stage, place: str, keep_open: Sequence[int] = ()) -> None:
    """Run a stage's command to its end; the file descriptors of `keep_open` stay open in it.

    Raises:
        SystemExit: It failed, or was interrupted.
    """
    words = stage.arguments()
    print(f"{place}: lit-agentrl {shlex.join(words)}", flush=True)
    child = _Child()
    with _on_sigterm(child.terminate):
        code = child.run([sys.executable, "-m", "lit_agentrl", *words], keep_open)
    if child.is_terminated:
        stopped(143)
    if code:
        how = f"was killed by signal {-code}" if code < 0 else "failed"
        print(f"stage {stage.name!r} {how}. Alone: lit-agentrl {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


def stopped(code: int) -> NoReturn:
    """Say how to go on, and exit.

    Raises:
        SystemExit: With `code`.
    """
    print("Stopped. The same command continues where it was.", file=sys.stderr)
    raise SystemExit(code) from None


class _Child:
    """A stage's process, which ends when this one is told to."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.is_terminated = False

    def run(self, words: list[str], keep_open: Sequence[int]) -> int:
        """Run to the end and give the exit code; 130 with `SystemExit` after Ctrl-C."""
        self.process = subprocess.Popen(words, pass_fds=keep_open)
        if self.is_terminated:  # since the handler was set
            self.process.terminate()
        try:
            return self.process.wait()
        except KeyboardInterrupt:
            self._end(self.process)
            stopped(130)

    def terminate(self, signum: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on; the stage saves what it has and ends."""
        self.is_terminated = True
        if self.process is not None:
            self.process.terminate()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """Wait for a process that was interrupted; after a while, or a second Ctrl-C, it is told once more."""
        for tell in (process.terminate, process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(PATIENCE)
                return
            tell()
        process.wait()


@contextlib.contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While inside, SIGTERM calls `handler`; outside the main thread, where Python allows none, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
