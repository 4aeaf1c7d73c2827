"""A deadline for a whole answer over HTTP."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def hang_up_at(end: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """Break the connection off at this time: its own timeout starts anew with every byte that trickles in."""

    def hang_up() -> None:
        with suppress(OSError, AttributeError):  # closed meanwhile
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, end - time.monotonic()), hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
