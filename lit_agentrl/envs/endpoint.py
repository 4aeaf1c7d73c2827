"""Chat endpoints on this machine: a program that asks its model for the next word asks the policy.

One server of the process listens on the loopback interface; every episode has an address of its own below it, which
holds a secret, so that no other program can speak in its place.
"""

from __future__ import annotations

import logging
import secrets
import socketserver
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from http.server import BaseHTTPRequestHandler
from typing import Any

from lit_agentrl.envs.chat_completions import ChatCall, ChatMessage, RefusedError, error_body, read_call

MAX_BODY = 16 * 2**20  # bytes
READ_SECONDS = 30.0  # for a request to arrive; waiting for its answer is not limited here
log = logging.getLogger(__name__)


class ChatRequest:
    """What a program asked, and waits for the answer of."""

    def __init__(self, messages: tuple[ChatMessage, ...]) -> None:
        self.messages = messages
        """The whole conversation, as the program sent it."""
        self.future: Future[str] = Future()

    def answer(self, text: str) -> None:
        """Give it its answer; nothing where the endpoint was closed meanwhile."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(text)


class ChatEndpoint:
    """The address of one episode.

    Args:
        server: What it is an address of.
        on_request: Called in a thread of the server with each request that can be answered.
    """

    def __init__(self, server: ChatServer, on_request: Callable[[ChatRequest], None]) -> None:
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{server.port}/{self.token}/v1"
        """What clients call the base URL."""
        self.refusal = ""
        """Why the last request that was refused was refused."""
        self._server, self._on_request = server, on_request
        self._lock = threading.Lock()
        self._waiting: set[ChatRequest] | None = set()  # None: closed

    def serve(self, call: ChatCall) -> str:
        """The answer to a call, once it is there.

        Raises:
            RefusedError: The endpoint was closed.
        """
        request = ChatRequest(call.messages)
        with self._lock:
            if self._waiting is None:
                raise _gone()
            self._waiting.add(request)
        self._on_request(request)
        try:
            return request.future.result()
        except CancelledError as error:
            raise _gone() from error
        finally:
            with self._lock:
                if self._waiting is not None:
                    self._waiting.discard(request)

    def close(self) -> None:
        """Refuse the requests that wait, with 410, and all that come. May be called again, and from any thread."""
        self._server.forget(self)
        with self._lock:
            waiting, self._waiting = self._waiting or set(), None
        for request in waiting:
            request.future.cancel()


class ChatServer(socketserver.ThreadingTCPServer):
    """Listens on a free port of the loopback interface, a thread a request, until the process ends.

    `http.server.HTTPServer` looks its own name up when it starts, which waits for a name server where none answers;
    this is the same without.
    """

    daemon_threads = True
    request_queue_size = 128  # the programs of a group start at the same moment

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = int(self.server_address[1])
        self._endpoints: dict[str, ChatEndpoint] = {}
        self._told: set[str] = set()
        threading.Thread(target=self.serve_forever, name="chat-server", daemon=True).start()

    def open(self, on_request: Callable[[ChatRequest], None]) -> ChatEndpoint:
        """A new address, whose requests go to `on_request`."""
        endpoint = ChatEndpoint(self, on_request)
        self._endpoints[endpoint.token] = endpoint
        return endpoint

    def find(self, path: str) -> ChatEndpoint:
        """The endpoint that a request's path is below.

        Raises:
            RefusedError: There is none.
        """
        token, _, rest = path.removeprefix("/").partition("/")
        endpoint = self._endpoints.get(token)
        if endpoint is None:
            raise _gone()
        if rest != "v1/chat/completions":
            raise RefusedError(404, "only POST to .../v1/chat/completions is served")
        return endpoint

    def forget(self, endpoint: ChatEndpoint) -> None:
        """Take an address away."""
        self._endpoints.pop(endpoint.token, None)

    def tell_not_heeded(self, names: tuple[str, ...]) -> None:
        """Log options of requests that change nothing, each once."""
        new = [name for name in names if name not in self._told]
        if new:
            self._told.update(new)
            log.warning("a program's requests set %s: not heeded, the run decides how to sample", ", ".join(new))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        log.debug("a connection broke", exc_info=True)


_lock = threading.Lock()
_servers: list[ChatServer] = []


def chat_server() -> ChatServer:
    """The server of this process, started with the first call."""
    with _lock:
        if not _servers:
            _servers.append(ChatServer())
        return _servers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = READ_SECONDS
    server: ChatServer

    def do_POST(self) -> None:
        endpoint = None
        try:
            endpoint = self.server.find(self.path)
            call = read_call(self._body())
            self.server.tell_not_heeded(call.not_heeded)
            self._write(200, *call.answer(endpoint.serve(call)))
        except RefusedError as error:
            if endpoint is not None:
                endpoint.refusal = error.message
            self._write(error.status, "application/json", error_body(error.message))

    def do_GET(self) -> None:
        message = "only POST to .../v1/chat/completions is served"
        self._write(404, "application/json", error_body(message))

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "send the request as application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(411, "send the request's Content-Length")
        if int(length) > MAX_BODY:
            raise RefusedError(413, f"a request may have {MAX_BODY} bytes, not {length}")
        return self.rfile.read(int(length))

    def _write(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # a thread lives no longer than its request
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the path holds the secret."""


def _gone() -> RefusedError:
    return RefusedError(410, "there is no such episode, or it is over")
