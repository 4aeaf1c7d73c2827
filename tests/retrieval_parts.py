"""Corpora, real search servers in processes of their own, and a server that does what a test tells it to."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from lit_agentrl.retrieval import Passage, Retriever

ROOT = Path(__file__).parent.parent
HOTPOTQA = ROOT.parent / "shared" / "data" / "hotpotqa"
PAGES = [
    ("red", "Red cup", "A cup of red clay."),
    ("blue", "Blue cup", "A blue cup, with a blue saucer."),
    ("table", "Table", "Tables of oak hold cups."),
    ("song", "Song", "The song of a bird."),
    ("bird", "Bird", "Birds sing in the morning, and a bird sings at night."),
]


def write_corpus(path: Path, pages: Sequence[tuple[str, str, str]] = PAGES) -> str:
    """A corpus of pages (id, title, text)."""
    items = [{"id": id, "contents": f'"{title}"\n{text}'} for id, title, text in pages]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def recall(retriever: Retriever, top_k: int) -> float:
    """The share of HotpotQA's supporting pages that are among the first `top_k` for their question."""
    questions = [json.loads(line) for line in (HOTPOTQA / "questions.jsonl").read_text().splitlines()]
    found = retriever.search([item["question"] for item in questions], top_k)
    hits = wanted = 0
    for item, passages in zip(questions, found, strict=True):
        titles = set(item["supporting_titles"])
        hits += len(titles & {passage.title for passage in passages})
        wanted += len(titles)
    return hits / wanted


def run_python(code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a process that imports what this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=check, env=environment, timeout=120,
    )  # fmt: skip


def start_server(corpus: str, *options: str) -> subprocess.Popen[str]:
    """`lit-agentrl serve-retriever` in a process of its own, ready or failed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lit_agentrl", "serve-retriever", "--corpus", corpus, *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def address(server: subprocess.Popen[str]) -> str:
    """The address that the server prints when it is ready."""
    assert server.stdout is not None
    line = server.stdout.readline()
    assert " at http://" in line, (line, server.communicate())
    return line.split(" at ")[1].strip()


@contextmanager
def serving(corpus: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address; it is killed in the end, if it still runs."""
    server = start_server(corpus, *options)
    try:
        yield server, address(server)
    finally:
        server.kill()
        server.communicate()


Deed = Callable[[socket.socket], None]


def reply(status: int, body: str | bytes) -> Deed:
    """Answer as a server of HTTP does."""
    content = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status} Said\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return lambda connection: connection.sendall(head.encode() + content)


def results(*passages: Sequence[object]) -> str:
    """The body of an answer."""
    return json.dumps({"result": passages})


def hang(connection: socket.socket) -> None:
    """Say nothing until the client goes."""
    connection.settimeout(20)
    connection.recv(1)


def trickle(connection: socket.socket) -> None:
    """A byte every 50 ms, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(400):
        connection.sendall(b" ")
        time.sleep(0.05)


def trickle_the_head(connection: socket.socket) -> None:
    """The same before the body begins."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(400):
        connection.sendall(b"x")
        time.sleep(0.05)


def break_off(connection: socket.socket) -> None:
    """Announce more than is sent."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


def drop(connection: socket.socket) -> None:
    """End without a word."""


class ScriptedServer:
    """Does one deed per connection, the last again and again; keeps the bodies of the requests."""

    def __init__(self, *deeds: Deed) -> None:
        self.bodies: list[dict[str, object]] = []
        self._deeds = list(deeds)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            deed = self._deeds.pop(0) if len(self._deeds) > 1 else self._deeds[0]
            threading.Thread(target=self._serve, args=(connection, deed), daemon=True).start()

    def _serve(self, connection: socket.socket, deed: Deed) -> None:
        with closing(connection):
            try:
                file = connection.makefile("rb")
                length = 0
                while (line := file.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.bodies.append(json.loads(file.read(length)))
                deed(connection)
            except OSError:
                pass  # the client went away, as some tests want


class Listed(Retriever):
    """Finds what it is given; counts its calls."""

    def __init__(self, answers: dict[str, list[Passage]]) -> None:
        self.answers = answers
        self.asked: list[tuple[tuple[str, ...], int]] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.asked.append((tuple(queries), top_k))
        return [self.answers[query][:top_k] for query in queries]
