"""Where downloaded and converted files are kept between runs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The folder for files that can be made again: $LIT_AGENTRL_CACHE, else lit-agentrl in $XDG_CACHE_HOME or ~/.cache.

    It is not created here. An empty variable counts as unset, as the XDG base directory specification asks.
    """
    if own := os.environ.get("LIT_AGENTRL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lit-agentrl"


@contextmanager
def one_process(lock: Path) -> Iterator[None]:
    """Let one process of the machine in at a time; the system frees the lock of a killed one."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
