"""Runs of the contract in processes of their own: memory is free again afterwards, and a hang has an end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CONFIG = "config.yaml"

SCHEDULERS = ("SLURM_", "TORCHELASTIC_")
LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What Lightning would take for ranks that someone else started."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    output: str
    is_late: bool = False
    """Whether it was stopped for taking too long."""


Execute = Callable[[Sequence[str], float], Ended]
"""Runs `lit-agentrl` with these arguments within so many seconds."""


def command(folders: Sequence[str]) -> list[str]:
    """What records one step after the other in the same processes: starting these takes most of the time."""
    return ["doctor", "--config", str(Path(folders[0]) / CONFIG), "--record", json.dumps(list(folders))]


def in_processes(arguments: Sequence[str], timeout: float) -> Ended:
    """Run it as its user would; what it started ends with it."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith(SCHEDULERS)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_agentrl", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(None if math.isinf(timeout) else timeout)
        except subprocess.TimeoutExpired:
            return Ended(_end(process), _text(output), is_late=True)
        finally:
            _end(process)
        return Ended(code, _text(output))


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill what is left of the run, other ranks included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _text(output: IO[str]) -> str:
    output.seek(0)
    return output.read()
