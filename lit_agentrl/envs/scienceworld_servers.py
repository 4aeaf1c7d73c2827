"""ScienceWorld's simulators, shared by more episodes than there are."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any


class Servers:
    """A bounded number of simulators, each with the episode that it played last. May be used from several threads.

    Args:
        limit: Simulators at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: list[tuple[Any, object]] = []  # the longest unused first
        self._running: dict[int, object] = {}
        self._num = 0
        self._changed = threading.Condition()

    def __reduce__(self) -> tuple[type[Servers], tuple[int]]:
        """Another process starts its own."""
        return Servers, (self.limit,)

    def borrowed(self, owner: object) -> _Borrowed:
        """A context with the simulator that `owner` used last, or another one; waits for one to be free."""
        return _Borrowed(self, owner)

    def holds(self, server: Any, owner: object) -> bool:
        """Whether a borrowed simulator is still in the state in which `owner` left it."""
        return self._running.get(id(server)) is owner

    def forget(self, owner: object) -> None:
        """The state of `owner` in its simulator, if it has one, is no longer its own."""
        with self._changed:
            self._free = [(server, None if last is owner else last) for server, last in self._free]

    def take(self, owner: object) -> Any:
        """A simulator; `holds` tells whether it is where `owner` left it."""
        with self._changed:
            while not self._free and self._num >= self.limit:
                self._changed.wait()
            # Its own, or a new one, or one that nobody comes back for, or the one that was unused for the longest.
            own = [place for place, (_, last) in enumerate(self._free) if last is owner and owner is not None]
            idle = [place for place, (_, last) in enumerate(self._free) if last is None]
            if not own and not idle and self._num < self.limit:
                self._num += 1
                server, last = None, None
            else:
                server, last = self._free.pop((own or idle or [0])[0])
                self._running[id(server)] = last
        return server if server is not None else self._start()

    def give_back(self, server: Any, owner: object) -> None:
        """Let others have a simulator."""
        with self._changed:
            self._running.pop(id(server), None)
            self._free.append((server, owner))
            self._changed.notify()

    def _start(self) -> Any:
        try:
            return import_module("scienceworld").ScienceWorldEnv("", envStepLimit=2**30)
        except BaseException:
            with self._changed:
                self._num -= 1
                self._changed.notify()
            raise


class _Borrowed:
    """A simulator for the length of a `with`; after an error in it, nobody's state is trusted to be in it."""

    def __init__(self, servers: Servers, owner: object) -> None:
        self.servers, self.owner = servers, owner
        self.server: Any = None

    def __enter__(self) -> Any:
        self.server = self.servers.take(self.owner)
        return self.server

    def __exit__(self, error: object, *rest: object) -> None:
        self.servers.give_back(self.server, None if error else self.owner)
