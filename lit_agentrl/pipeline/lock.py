"""One pipeline at a time in a root folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_agentrl.errors import UserError

FILE_NAME = "pipeline.lock"


@contextmanager
def only_one(root: Path) -> Iterator[int]:
    """Let one pipeline run in `root`; gives the descriptor to hand on to the processes of its stages.

    The system holds the lock for as long as the pipeline or a stage of it lives, so that one that was killed leaves a
    file without a lock, which is taken over, and a stage that outlived its pipeline is not run twice.

    Raises:
        UserError: Another pipeline, or a stage that one left running, is there.
    """
    path = root / FILE_NAME
    root.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{path.parent}: another pipeline runs there, process {holder or 'unknown'}; if that one is gone, a "
                "stage of it still runs. Wait for its end, end it, or give this pipeline another root=FOLDER."
            ) from None
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the other one ended, and took its file away, between opening and locking
