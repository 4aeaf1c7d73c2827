"""A thread that ends a process which another one's death, or a signal, would leave waiting for ever."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 0.2
OWN_SECONDS = 0.5
"""What the main thread has to find out by itself: most collectives fail at once when a peer is gone."""


class Watch(threading.Thread):
    """Watches over a process that waits for others, until `stop`.

    Where `lost` has something to say, the main thread is sent SIGTERM, whose handler can ask `reason`; after a SIGTERM
    or a SIGINT from outside it is left to its handlers. Either way the process has `patience` seconds to end in order,
    and is then ended from here: a handler in Python does not run while the main thread waits in a collective.

    Args:
        lost: What is gone that this process cannot do without; empty while all is there. Called every 0.2 s.
        told: Called when a signal has told this process to end, with its number.
        last_words: What to do right before the process is ended from here.
        patience: Seconds for an orderly end.
    """

    def __init__(
        self,
        lost: Callable[[], str],
        told: Callable[[int], object],
        last_words: Callable[[], object],
        patience: float,
    ) -> None:
        super().__init__(name="lit-agentrl-watch", daemon=True)  # the interpreter's end does not wait for it
        self.reason = ""
        """What was lost."""
        self.signal = 0
        """The signal that told this process to end; 0 for none."""
        self._lost, self._told, self._last_words, self._patience = lost, told, last_words, patience
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._previous: int | None = None
        self._is_stopped = threading.Event()
        self.is_ending = threading.Event()
        """Set by who sees that the main thread is on its way out already."""

    def listen(self) -> None:
        """Hear of signals when they come, not when the main thread gets to its handlers. For the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def stop(self) -> None:
        """End the watch; the process has done its work."""
        self._is_stopped.set()
        if self._previous is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._previous)
            self._previous = None

    def run(self) -> None:
        """Wait for a loss or a signal, then for the end."""
        while not self._is_stopped.is_set():
            if number := self._heard():
                self.signal = number
                self._told(number)
                break
            if reason := self._lost():
                self._lose(reason)
                break
        if not self._is_stopped.wait(self._patience):
            self._end()

    def _heard(self) -> int:
        """A signal to end that came within the next 0.2 s; 0 for none."""
        ready, _, _ = select.select([self._read], [], [], POLL_SECONDS)
        numbers = self._read.recv(64) if ready else b""
        return next((number for number in numbers if number in (signal.SIGTERM, signal.SIGINT)), 0)

    def _lose(self, reason: str) -> None:
        self.reason = reason
        time.sleep(OWN_SECONDS)
        if not self.is_ending.is_set() and not self._is_stopped.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self) -> None:
        with contextlib.suppress(Exception):  # whatever is broken by now, the process has to go
            self._last_words()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(128 + self.signal if self.signal else 1)
