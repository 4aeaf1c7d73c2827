"""A made-up vLLM server on the loopback interface, and faults that are put into its answers.

It continues a context by counting up from its last token; what weights it has is told by the version that it was
handed last, as the real one's workers tell it.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

Fault = Callable[["FakeVLLM", str, dict[str, Any]], "tuple[int, bytes] | None"]
"""Given the server, the path and the request: an answer in the place of the right one, or None to leave that."""


class FakeVLLM:
    """The server; `with FakeVLLM() as server: ... server.url`."""

    def __init__(self, fault: Fault | None = None, logprobs_mode: str = "processed_logprobs") -> None:
        self.fault, self.logprobs_mode = fault, logprobs_mode
        self.version = ""
        self.folders: list[str] = []
        self.adapters: list[str] = []
        self.held: list[dict[str, Any]] = []  # what its workers hold of adapters, two at most
        self.lora_rank, self.is_changed = 8, False
        self.requests: list[dict[str, Any]] = []
        self.num_resets = 0
        self.fingerprint = {"count": 3, "total": 1.5, "squares": 2.25}
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def answer(self, body: dict[str, Any]) -> None:
                status, raw = (server.fault and server.fault(server, self.path, body)) or server.right(self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False  # hung requests are left behind
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeVLLM":
        threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def right(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """What a server without faults answers."""
        with self._lock:
            status, value = self._right(path.partition("?")[0], body)
        return status, json.dumps(value).encode()

    def _right(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "base"}, *({"id": name} for name in self.adapters)]}
        if path == "/reset_prefix_cache":
            self.num_resets += 1
            return 200, {"success": True}
        if path == "/collective_rpc":
            return 200, {"results": [self._worker(body["method"], body["args"])]}
        if path == "/v1/load_lora_adapter":
            self.adapters.append(body["lora_name"])
            self.folders.append(body["lora_path"])
            self.held = [*self.held, adapter_moments(body["lora_path"])][-2:]
            return 200, "Success: LoRA adapter added."
        if path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
            return 200, "Success"
        if path == "/v1/completions":
            self.requests.append(body)
            if body["model"] not in ("base", *self.adapters):
                return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
            return 200, completion(body)
        return 404, {"error": "not found"}

    def _worker(self, method: str, args: list[str]) -> dict[str, Any]:
        if method == "lit_load":
            self.folders.append(args[0])
            self.version, self.is_changed = args[1], True
            return {"version": self.version}
        if method == "lit_fingerprint":
            return self.fingerprint
        if method == "lit_adapters":
            return {"is_changed": self.is_changed, "adapters": self.held}
        state = {"version": self.version, "logprobs_mode": self.logprobs_mode, "dtype": "bfloat16"}
        return state | {"lora_rank": self.lora_rank, "is_changed": self.is_changed}


class FaultyProxy(FakeVLLM):
    """Passes everything on to a real server, but for the faults."""

    def __init__(self, behind: str, fault: Fault | None = None) -> None:
        super().__init__(fault)
        self.behind = behind

    def right(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """What the real server answers."""
        data = None if path == "/v1/models" else json.dumps(body).encode()
        request = urllib.request.Request(self.behind + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def adapter_moments(folder: str) -> dict[str, Any]:
    """What a worker in bfloat16 tells of an adapter: the second matrices are scaled."""
    options = json.loads((Path(folder) / "adapter_config.json").read_text())
    numbers: list[float] = []
    for name, matrix in load_file(Path(folder) / "adapter_model.safetensors").items():
        scale = options["lora_alpha"] / options["r"] if "lora_B" in name else 1
        numbers += (matrix.bfloat16() * scale).flatten().tolist()
    return {"count": len(numbers), "total": sum(numbers), "squares": sum(number * number for number in numbers)}


def completion(body: dict[str, Any], num_tokens: int | None = None, finish: str = "") -> dict[str, Any]:
    """The right answer to a request; or one of so many tokens that ended so."""
    first = (body["prompt"][-1] + 1) % 300
    tokens: list[int] = []
    while len(tokens) < (body["max_tokens"] if num_tokens is None else num_tokens):
        tokens.append((first + len(tokens)) % 300)
        if tokens[-1] in body["stop_token_ids"]:
            break
    ended = "stop" if tokens and tokens[-1] in body["stop_token_ids"] else "length"
    choice = {
        "index": 0,
        "text": "",
        "token_ids": tokens,
        "prompt_token_ids": body["prompt"],
        "finish_reason": finish or ended,
        "logprobs": {"token_logprobs": [-0.01 * token for token in tokens]},
    }
    return {
        "model": body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens_details": {"cached_tokens": len(body["prompt"]) - 1}},
    }


def only(path: str, fault: Fault) -> Fault:
    """`fault` for the calls of one path alone."""
    return lambda server, called, body: fault(server, called, body) if called.partition("?")[0] == path else None


def first(count: int, fault: Fault) -> Fault:
    """`fault` for the first calls that it is given, the right answer afterwards."""
    left = [count]
    lock = threading.Lock()

    def act(server: FakeVLLM, path: str, body: dict[str, Any]) -> tuple[int, bytes] | None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                return None
        return fault(server, path, body)

    return act


def status(code: int, text: str = "out of order") -> Fault:
    """An answer with this status."""
    return lambda server, path, body: (code, json.dumps({"error": text}).encode())


def raw(text: bytes) -> Fault:
    """These bytes, with status 200."""
    return lambda server, path, body: (200, text)


def hang(seconds: float) -> Fault:
    """Nothing for so long, and then the right answer."""

    def act(server: FakeVLLM, path: str, body: dict[str, Any]) -> None:
        time.sleep(seconds)

    return act


def changed(**fields: Any) -> Fault:
    """The right completion with other values in its choice."""

    def act(server: FakeVLLM, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        answer = completion(body)
        answer["choices"][0] |= fields
        return 200, json.dumps(answer).encode()

    return act


def too_few(count: int) -> Fault:
    """A completion that ends after so many tokens, for no reason."""
    return lambda server, path, body: (200, json.dumps(completion(body, count)).encode())
