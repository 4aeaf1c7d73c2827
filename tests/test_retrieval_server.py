"""`lit-agentrl serve-retriever`: a real process, asked rightly and wrongly."""

import http.client
import json
import math
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import pytest

from lit_agentrl.cli import main
from lit_agentrl.retrieval import BM25Retriever, HTTPRetriever, Passage, RetrievalError, Retriever
from lit_agentrl.retrieval.protocol import Limits, ProtocolError, decode_request
from lit_agentrl.retrieval.server import MOST_BYTES, RetrievalServer
from retrieval_parts import HOTPOTQA, Listed, recall, serving, write_corpus

pytest.importorskip("bm25s", reason="needs the search extra: pip install 'lit-agentrl[search]'")


BIRD = pytest.approx(math.log(1 + 3.5 / 2.5) * 3 / (3 + 0.9 * (0.6 + 0.4 * 7 / 5.2)), rel=1e-5)
"""BM25 of "birds" in the page about birds, by hand: 3 of its 7 words, a mean of 5.2 words, 2 pages of 5."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("server") / "corpus.jsonl")


@pytest.fixture(scope="module")
def url(corpus: str) -> Iterator[str]:
    with serving(corpus, "--port", "0", "--top_k", "2") as (_, found):
        yield found


def ask(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, object]:
    """Status and body of an answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def post(url: str, item: object) -> tuple[int, object]:
    return ask(url, "POST", "/retrieve", json.dumps(item).encode())


def raw(url: str, data: bytes) -> bytes:
    """Everything that the server says to these bytes, after which nothing comes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(1 << 16):
            answer += chunk
    return answer


def is_healthy(url: str) -> bool:
    return ask(url, "GET", "/health") == (200, {"status": "ok"})


def test_the_client_finds_through_the_server_what_the_retriever_finds(corpus, url):
    queries = ["blue cup", "birds", "zebra", "\ud800 cup ünïcode"]
    expected = BM25Retriever(corpus).search(queries, 3)
    assert HTTPRetriever(url).search(queries, 3) == expected
    assert [len(found) for found in expected] == [3, 2, 0, 3]


def test_the_protocol_is_that_of_search_r1(url):
    status, scored = post(url, {"queries": ["birds"], "topk": 1, "return_scores": True})
    document = {"id": "bird", "contents": '"Bird"\nBirds sing in the morning, and a bird sings at night.'}
    assert (status, scored) == (200, {"result": [[{"document": document, "score": BIRD}]]})
    assert post(url, {"queries": ["birds"], "topk": 1}) == (200, {"result": [[document]]})
    assert post(url, {"queries": [], "topk": 1}) == (200, {"result": []})
    _, default = post(url, {"queries": ["cup"], "topk": None})
    assert len(default["result"][0]) == 2  # --top_k


def test_one_connection_serves_many_requests(url):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    began = time.monotonic()
    for _ in range(50):
        connection.request("POST", "/retrieve", b'{"queries": ["cup"]}')
        assert len(json.loads(connection.getresponse().read())["result"][0]) == 2
    assert time.monotonic() - began < 1.9  # 40 ms each is what waiting for acknowledgements would take
    connection.close()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], "the body must be an object"),
        ({}, "the body must be an object"),
        ({"queries": "cup"}, "`queries` must be a list of texts"),
        ({"queries": ["cup", 1]}, "`queries` must be a list of texts"),
        ({"queries": ["cup"] * 1025}, "1025 queries are too many for one request: at most 1024"),
        ({"queries": ["cup"], "topk": 0}, "`topk` must be a whole number from 1 to 100"),
        ({"queries": ["cup"], "topk": 101}, "`topk` must be a whole number from 1 to 100"),
        ({"queries": ["cup"], "topk": 1.5}, "`topk` must be a whole number from 1 to 100"),
        ({"queries": ["cup"], "topk": True}, "`topk` must be a whole number from 1 to 100"),
        ({"queries": ["cup"], "return_scores": 1}, "`return_scores` must be true or false"),
    ],
)
def test_bad_requests_are_told_why(item, message, url):
    status, answer = post(url, item)
    assert status == 400
    assert answer["error"].startswith(message)
    assert is_healthy(url)


def test_the_client_shows_what_the_server_refuses(url):
    with pytest.raises(RetrievalError, match=r"asked once, and it answered 400 .*`topk` must be a whole number"):
        HTTPRetriever(url).search(["cup"], 1000)


def test_other_paths_and_methods(url):
    assert is_healthy(url)
    for method, path in (("GET", "/"), ("GET", "/retrieve"), ("POST", "/health"), ("POST", "/retrieve/x")):
        status, answer = ask(url, method, path, b"x" * 100_000 if method == "POST" else None)
        assert (status, answer["error"]) == (404, f"there is GET /health and POST /retrieve, not {method} {path}")
    status, answer = ask(url, "PUT", "/retrieve", b"{}")
    assert (status, answer["error"]) == (501, "Unsupported method ('PUT')")


def test_a_request_that_is_too_large_is_refused_unread(url):
    status, answer = ask(url, "POST", "/retrieve", b" " * (MOST_BYTES + 1))
    assert (status, answer) == (413, {"error": f"a request may have {MOST_BYTES} bytes, not {MOST_BYTES + 1}"})
    announced = raw(url, b"POST /retrieve HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413 ")
    assert is_healthy(url)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"Content-Length: -1\r\n",
        b"Content-Length: ten\r\n",
        b"Content-Length: \xb2\r\n",
        b"Content-Length: " + b"9" * 30 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n",
    ],
)
def test_a_request_without_its_length_is_refused(head, url):
    answer = raw(url, b"POST /retrieve HTTP/1.1\r\n" + head + b'\r\n{"queries": []}')
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"needs its length in bytes as Content-Length" in answer


def test_noise_does_not_stop_it(url):
    """500 requests that random changes were made to: each is answered in HTTP or hung up on, and the next is heard."""
    rng = random.Random(0)
    body = json.dumps({"queries": ["blue cup"], "topk": 2, "return_scores": True}).encode()
    whole = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    statuses = set()
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            where = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[where] = rng.randrange(256)
            else:
                del data[where : where + rng.randint(1, 20)]
        answer = raw(url, bytes(data))
        # What lacks a version in its first line is answered as HTTP/0.9 asks: by the body alone.
        statuses.add(int(answer[9:12]) if answer.startswith(b"HTTP/1.") else 0)
    assert statuses <= {0, 200, 400, 404, 413, 414, 431, 501, 505}
    assert statuses >= {200, 400, 404, 501}
    assert is_healthy(url)


def test_random_json_is_refused_or_answered(url):
    """A slow obvious twin of the rules says which."""
    rng = random.Random(1)
    values = {
        "queries": [["cup"], [], ["cup", "blue"], ["cup", 3], [["cup"]], "cup", None, {"a": 1}, 1],
        "topk": [1, 3, 100, None, 0, 101, -1, 1.0, True, "3", [1]],
        "return_scores": [True, False, None, 0, "true", []],
    }
    accepted = 0
    for _ in range(600):
        item = {key: rng.choice(some) for key, some in values.items() if rng.random() < 0.85}
        fine = (
            isinstance(item.get("queries"), list)
            and all(isinstance(query, str) for query in item["queries"])
            and (item.get("topk") is None or (type(item["topk"]) is int and 1 <= item["topk"] <= 100))
            and (type(item.get("return_scores", False)) is bool)
        )
        status, _ = post(url, item)
        assert status == (200 if fine else 400), item
        accepted += fine
    assert 20 < accepted < 200


def test_a_slow_client_holds_up_nobody(url):
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as slow:
        slow.sendall(b"POST /retrieve HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert is_healthy(url)


class Broken(Retriever):
    """Cannot search."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        raise self.error


def test_a_search_that_fails_is_told_without_the_servers_insides():
    with RetrievalServer(Broken(RetrievalError("the corpus was changed"))) as server:
        server.start()
        assert post(server.url, {"queries": ["x"]}) == (503, {"error": "the corpus was changed"})
    with RetrievalServer(Broken(KeyError("secret"))) as server:
        server.start()
        status, answer = post(server.url, {"queries": ["x"]})
        assert (status, answer) == (500, {"error": "the search failed; the server's log says why"})
        assert is_healthy(server.url)


def test_many_ask_at_a_time():
    source = Listed({"a": [Passage("a", "a", "", 1.0)]})
    with RetrievalServer(source) as server:
        server.start()
        answers: list[object] = []
        retriever = HTTPRetriever(server.url, retries=0, cache_size=0)
        threads = [threading.Thread(target=lambda: answers.append(retriever.search(["a"], 1))) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [[[Passage("a", "a", "", 1.0)]]] * 100


def test_before_its_start_connections_are_refused():
    with RetrievalServer(Listed({})) as server:
        with pytest.raises(RetrievalError, match="Connection refused"):
            HTTPRetriever(server.url, retries=0).search(["a"], 1)
        server.start()
        assert is_healthy(server.url)
    with pytest.raises(RetrievalError, match="Connection refused"):
        HTTPRetriever(server.url, retries=0).search(["a"], 1)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_it_cleanly(signum, code, corpus):
    with serving(corpus, "--port", "0") as (server, found):
        assert is_healthy(found)
        began = time.monotonic()
        server.send_signal(signum)
        rest, errors = server.communicate(timeout=10)
        assert (server.returncode, rest, errors) == (code, "", "")
        assert time.monotonic() - began < 5


def test_another_host_comes_with_a_warning(corpus):
    with serving(corpus, "--port", "0", "--host", "0.0.0.0") as (server, found):
        assert found.startswith("http://0.0.0.0:")
        assert is_healthy(found)
        server.terminate()
        assert "warning: 0.0.0.0 can be reached from other machines" in server.communicate(timeout=10)[1]


def test_a_port_in_use_is_found_out_before_an_index_is_built(tmp_path, url, capsys, monkeypatch):
    monkeypatch.setattr(BM25Retriever, "prepare", lambda self: pytest.fail("built"))
    port = url.rsplit(":", 1)[1]
    with pytest.raises(SystemExit) as end:
        main(["serve-retriever", "--corpus", write_corpus(tmp_path / "new.jsonl"), "--port", port])
    assert end.value.code == 2
    assert f"error: 127.0.0.1:{port} cannot be listened on (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--top_k", "0"], "--top_k 0 is out of range"),
        (["--kind", "dense"], "--kind dense needs --model"),
        (["--model", "e5"], "--model would do nothing with --kind bm25"),
        (["--host", "no.such.host.invalid"], "cannot be listened on"),
        (["--corpus", "/no/such/file"], "corpus='/no/such/file' cannot be read"),
    ],
)
def test_wrong_options_are_refused(options, message, corpus, capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve-retriever", "--corpus", corpus, *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve-retriever", "--help"])
    assert end.value.code == 0
    assert "--corpus" in capsys.readouterr().out
    main(["--help"])
    assert "serve-retriever" in capsys.readouterr().out


def test_limits_of_a_server_can_be_set():
    body = b'{"queries": ["a", "b"], "topk": 5}'
    assert decode_request(body, 3, Limits(num_queries=2, top_k=5)).top_k == 5
    with pytest.raises(ProtocolError, match="at most 1"):
        decode_request(body, 3, Limits(num_queries=1))
    with pytest.raises(ProtocolError, match="from 1 to 4"):
        decode_request(body, 3, Limits(top_k=4))


@pytest.mark.skipif(not HOTPOTQA.is_dir(), reason="the real HotpotQA pages are not beside the checkout")
def test_real_questions_over_the_wire():
    path = str(HOTPOTQA / "corpus.jsonl")
    with serving(path, "--port", "0") as (_, found):
        assert recall(HTTPRetriever(found), 5) == recall(BM25Retriever(path), 5) > 0.62
