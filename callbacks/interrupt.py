"""SIGTERM that ends a run at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM raises `SIGTERMException` where the main thread is, and the process exits with 143.

    Lightning only notes the signal and looks at the note between batches: a collection of minutes would run to its end,
    longer than a scheduler waits before it kills. Lightning's handler calls the one it found after its own, so this
    must be entered before the Trainer runs. Outside the main thread, where Python allows no handlers, it does nothing.

    Example:
        ```python
        with stop_on_sigterm():
            trainer.fit(module, datamodule)
        ```
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break the shutdown of the first
        raise SIGTERMException(128 + signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
