"""A search server for other processes and machines, in Search-R1's protocol."""

from __future__ import annotations

import json
import logging
import socket
import threading
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from lit_agentrl.retrieval.base import RetrievalError, Retriever
from lit_agentrl.retrieval.protocol import PATH, Limits, ProtocolError, decode_request, encode_answer

log = logging.getLogger(__name__)

MOST_BYTES = 4 << 20
"""Of one request."""
MOST_DISCARDED = 64 << 20
"""Of a request that is refused, so that the refusal can be read."""
LINGER = 1.0
"""Seconds to wait for more of it."""
SILENCE = 30.0
"""Seconds that a connection may say nothing before it is closed."""


class RetrievalServer(ThreadingHTTPServer):
    """Answers searches; every connection has its own thread, and the retriever is shared by all.

    Making it takes the port, so that a port in use is found out at once; connections are refused until `start`.

    Args:
        retriever: Who searches.
        host: The address to listen on.
        port: The port, 0 for any that is free.
        top_k: Passages per query where a request does not say.
        limits: What one request may ask for.
    """

    daemon_threads = True
    request_queue_size = 128  # the default of 5 refuses connections when all workers of a run ask at a time

    def __init__(
        self, retriever: Retriever, host: str = "127.0.0.1", port: int = 0, top_k: int = 3, limits: Limits | None = None
    ) -> None:
        super().__init__((host, port), partial(_Handler, retriever, top_k, limits or Limits()), bind_and_activate=False)
        self._answers = False
        try:
            self.server_bind()
        except OSError:
            self.server_close()
            raise

    def start(self) -> None:
        """Answer from now on, in a thread of its own, until the server is left as a context or closed."""
        self.server_activate()
        self._answers = True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        if self._answers:
            self.shutdown()
        self.server_close()

    def server_bind(self) -> None:
        """As it is, without asking name servers what this machine is called, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def shutdown_request(self, request: Any) -> None:
        """End a connection so that the answer arrives: closing with unread bytes would discard it on its way."""
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER)
            left = MOST_DISCARDED
            while left > 0 and (got := len(request.recv(1 << 16))):
                left -= got
        self.close_request(request)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "lit-agentrl"
    timeout = SILENCE
    wbufsize = -1  # head and body leave together, or the second waits for the first to be acknowledged

    def __init__(self, retriever: Retriever, top_k: int, limits: Limits, *args: Any) -> None:
        self._retriever, self._top_k, self._limits = retriever, top_k, limits
        super().__init__(*args)

    def do_GET(self) -> None:
        """`/health`."""
        if urlsplit(self.path).path == "/health":
            self._send(HTTPStatus.OK, json.dumps({"status": "ok"}).encode())
        else:
            self.send_error(HTTPStatus.NOT_FOUND, f"there is GET /health and POST {PATH}, not GET {self.path}")

    def do_POST(self) -> None:
        """`/retrieve`."""
        if urlsplit(self.path).path != PATH:
            self.send_error(HTTPStatus.NOT_FOUND, f"there is GET /health and POST {PATH}, not POST {self.path}")
            return
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal() and len(length) < 20):
            self.send_error(HTTPStatus.BAD_REQUEST, "a request needs its length in bytes as Content-Length")
            return
        if int(length) > MOST_BYTES:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {MOST_BYTES} bytes, not {length}")
            return
        body = self.rfile.read(int(length))
        try:
            request = decode_request(body, self._top_k, self._limits)
            found = self._retriever.search(request.queries, request.top_k)
            answer = encode_answer(found, request.return_scores)
        except ProtocolError as error:
            self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        except RetrievalError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except Exception:
            log.exception("a search for %d queries failed", len(request.queries))
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "the search failed; the server's log says why")
        else:
            self._send(HTTPStatus.OK, answer)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error as JSON; the connection ends with it, because what is left of the request was not read."""
        self.close_connection = True
        self._send(code, json.dumps({"error": message or HTTPStatus(code).phrase}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """A line per request is for debugging only."""
        log.debug(format, *args)

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
