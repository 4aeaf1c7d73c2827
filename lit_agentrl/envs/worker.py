"""The other end of `lit_agentrl.envs.process`: a process that holds environments and answers one call after another.

Started as `python -m lit_agentrl.envs.worker FD SECONDS` with one end of a socket pair; ends when the other end is
closed. A call of more than SECONDS ends it too (0 for never): nobody else would, if the trainer was killed meanwhile.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, Literal

from lit_agentrl.envs.pool import EnvironmentTimeoutError
from lit_agentrl.types import Environment, EnvironmentSuite, RestorableEnvironment

Reply = tuple[Literal["result", "error", "timeout"], Any, float]
"""What came of a call; its result or the error's text; and the seconds until an environment timed out by itself."""


class Worker:
    """The environments of one process, by number.

    Args:
        suite: What starts them.
    """

    def __init__(self, suite: EnvironmentSuite) -> None:
        self.suite = suite
        self.environments: dict[int, Environment] = {}

    def answer(self, name: str, number: int, argument: Any) -> Any:
        """The result of the call `name` on environment `number`."""
        if name == "make":
            self.environments[number] = self.suite.make(argument)
            return isinstance(self.environments[number], RestorableEnvironment)
        if name == "close":
            return self.environments.pop(number).close()
        environment = self.environments[number]
        if name == "snapshot":
            assert isinstance(environment, RestorableEnvironment)
            return environment.snapshot()
        result: Any = None
        if name == "reset":
            result = environment.reset()
        elif name == "step":
            result = environment.step(argument)
        elif name == "restore":
            assert isinstance(environment, RestorableEnvironment)
            environment.restore(argument)
        return result, environment.anchor, environment.success, dict(getattr(environment, "metrics", {}))


def serve(connection: Connection, seconds: float) -> None:
    """Answer calls until the other end is closed. The first thing it sends is the suite."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115  # open as long as the process
    worker: Worker | None = None
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        except Exception as error:  # the suite's class is in no module that can be imported here
            connection.send(("error", _describe(error), 0.0))
            return
        if seconds:  # its watchdog is a thread in C: it works while an environment holds the interpreter lock
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            if worker is None:
                worker = Worker(call)
                reply: Reply = ("result", None, 0.0)
            else:
                reply = ("result", worker.answer(*call), 0.0)
        except EnvironmentTimeoutError as error:
            reply = ("timeout", str(error), error.seconds)
        except BaseException as error:  # SystemExit too: an environment must not end the process that others are in
            reply = ("error", _describe(error), 0.0)
        faulthandler.cancel_dump_traceback_later()
        try:
            connection.send(reply)
        except Exception as error:  # an anchor or a snapshot that cannot be pickled
            connection.send(("error", _describe(error), 0.0))


def _describe(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; its end closes the connection
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
