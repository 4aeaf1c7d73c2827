"""Suites whose environments misbehave, in a module of their own so that worker processes can import them."""

import ctypes
import os
import threading
import time

from lit_agentrl.envs.pool import EnvironmentTimeoutError
from lit_agentrl.envs.toy import EchoEnvironment, EchoSuite
from lit_agentrl.types import Environment, Observation


class HostileEnvironment(EchoEnvironment):
    """Does what it is told instead of echoing."""

    @property
    def metrics(self) -> dict[str, float]:
        return {"replies": float(len(self.replies))}

    def step(self, action: str) -> tuple[Observation, float, bool]:
        if action == "hang":
            ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter lock: no other thread of the process runs
        if action == "sleep":
            time.sleep(60)
        if action == "die":
            os._exit(3)
        if action == "raise":
            raise ValueError("no such word")
        if action == "late":
            raise EnvironmentTimeoutError("the server was too slow", 7.0)
        if action == "exit":
            raise SystemExit(1)
        return super().step(action)


class HostileSuite(EchoSuite):
    needs_process = True

    def make(self, task: str) -> Environment:
        return HostileEnvironment(super().make(task).word)


class PidSuite(EchoSuite):
    """Its environments tell which process they are in."""

    def make(self, task: str) -> Environment:
        return EchoEnvironment(str(os.getpid()))


class LockedSuite(EchoSuite):
    def __init__(self) -> None:
        self.lock = threading.Lock()
