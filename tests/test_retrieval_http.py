"""The client: against real sockets that answer, fail, hang, trickle and lie; and real servers that are killed."""

import pickle
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import CachedRetriever, HTTPRetriever, Passage, RetrievalError, SearchCounts
from retrieval_parts import (
    Listed,
    ScriptedServer,
    address,
    break_off,
    drop,
    hang,
    reply,
    results,
    serving,
    start_server,
    trickle,
    trickle_the_head,
    write_corpus,
)

CUP = {"document": {"id": "red", "contents": '"Red cup"\nOf clay.'}, "score": 1.5}
FOUND = [[Passage("red", "Red cup", "Of clay.", 1.5)]]
GOOD = reply(200, results([CUP]))


def client(server: ScriptedServer, **options: float) -> HTTPRetriever:
    return HTTPRetriever(server.url, **{"timeout": 5.0, "backoff": 0.01, **options})


def test_a_search_is_one_request_of_the_protocol():
    with ScriptedServer(reply(200, results([CUP], []))) as server:
        retriever = client(server)
        assert retriever.search(["cup", "zebra"], 3) == [*FOUND, []]
        assert server.bodies == [{"queries": ["cup", "zebra"], "topk": 3, "return_scores": True}]
        assert retriever.counts == SearchCounts(queries=2, requests=1)
        assert retriever.search([], 3) == []
        with pytest.raises(UserError, match="top_k=0"):
            retriever.search(["cup"], 0)
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"id": 7, "contents": '"T"\nx'}, Passage("7", "T", "x")),
        ({"document": {"contents": '"T"\nx'}, "score": 2}, Passage("", "T", "x", 2.0)),
        ({"document": {"id": "7", "contents": '"T"\nx'}, "score": None}, Passage("7", "T", "x")),
        ({"document": {"id": "7", "contents": '"T"\nx'}}, Passage("7", "T", "x")),
        ({"title": "T", "text": "x", "contents": '"T"\nx'}, Passage("", "T", "x")),
    ],
)
def test_documents_of_other_servers_are_read(item, expected):
    """Without scores, without ids, with more keys: the original's with Lucene sends title, text and contents."""
    with ScriptedServer(reply(200, results([item]))) as server:
        assert client(server).search(["x"], 1) == [[expected]]


def test_a_server_that_sends_more_is_cut():
    many = [{"id": number, "contents": f'"{number}"\nx'} for number in range(10)]
    with ScriptedServer(reply(200, results(many))) as server:
        assert [passage.id for passage in client(server).search(["x"], 3)[0]] == ["0", "1", "2"]


@pytest.mark.parametrize("failure", [reply(500, "down"), reply(503, '{"error": "busy"}'), drop, break_off])
def test_what_may_pass_is_tried_again(failure):
    with ScriptedServer(failure, failure, GOOD) as server:
        retriever = client(server)
        assert retriever.search(["cup"], 1) == FOUND
        assert retriever.counts == SearchCounts(queries=1, requests=3, retries=2)
        assert server.bodies == [server.bodies[0]] * 3


def test_waits_double():
    with ScriptedServer(drop) as server:
        retriever = client(server, retries=3, backoff=0.1)
        began = time.monotonic()
        with pytest.raises(RetrievalError):
            retriever.search(["cup"], 1)
        assert 0.7 <= time.monotonic() - began < 3  # 0.1 + 0.2 + 0.4
        assert retriever.longest_seconds == pytest.approx(4 * 5.0 + 0.7)


@pytest.mark.parametrize("status", [301, 400, 404, 413, 422])
def test_what_would_come_again_is_not_tried_again(status):
    with ScriptedServer(reply(status, '{"error": "no\nsuch thing"}'), GOOD) as server:
        retriever = client(server)
        with pytest.raises(RetrievalError) as caught:
            retriever.search(["cup"], 1)
        assert str(caught.value) == (
            f"the search for 'cup' failed: {server.url}/retrieve was asked once, and it answered {status} "
            r"""'{"error": "no\nsuch thing"}'."""
        )
        assert retriever.counts == SearchCounts(queries=1, requests=1, failures=1)


def test_a_failure_says_what_was_asked_where_how_often_and_what_came_back():
    with ScriptedServer(reply(500, "x" * 5000)) as server:
        retriever = client(server, retries=2)
        with pytest.raises(RetrievalError) as caught:
            retriever.search(["which\ncup " + "?" * 500, "b", "c"], 1)
        text = str(caught.value)
        assert re.fullmatch(
            rf"the search for 'which\\ncup \?+\.\.\.' and 2 more failed: {server.url}/retrieve was asked 3 times, "
            r"and it answered 500 'x+\.\.\.'\.",
            text,
        )
        assert len(text) < 400
        assert retriever.counts == SearchCounts(queries=3, requests=3, retries=2, failures=3)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("<html>busy</html>", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", 'no object with a list under "result"'),
        ('{"results": []}', 'no object with a list under "result"'),
        ('{"result": null}', 'no object with a list under "result"'),
        (results(), "0 results for 1 queries"),
        (results([CUP], [CUP]), "2 results for 1 queries"),
        (results({"document": 1}), "must be a list of documents, not dict"),
        (results(["text"]), "a document must be an object, not str"),
        (results([{"document": "text", "score": 1}]), "`document` must be an object, not str"),
        (results([{"document": {"id": "1"}, "score": 1}]), "no text under `contents`"),
        (results([{"id": "1", "contents": 5}]), "no text under `contents`"),
        (results([{"id": [1], "contents": "x"}]), "id of a document must be text or a whole number, not list"),
        (results([{"id": True, "contents": "x"}]), "id of a document must be text or a whole number, not bool"),
        (results([{**CUP, "score": "high"}]), "a score must be a number, not str"),
        (results([{**CUP, "score": float("nan")}]), "a score must be finite, not nan"),
    ],
)
def test_malformed_answers_are_errors(body, why):
    with ScriptedServer(reply(200, body), GOOD) as server:
        retriever = client(server)
        with pytest.raises(RetrievalError, match=rf"asked once, and the answer is malformed: .*{re.escape(why)}"):
            retriever.search(["cup"], 1)
        assert retriever.counts.retries == 0


@pytest.mark.parametrize("deed", [hang, trickle, trickle_the_head])
def test_a_try_ends_in_time(deed):
    """Whether nothing comes, or too slowly: every byte would start a socket's own clock anew."""
    with ScriptedServer(deed) as server:
        retriever = client(server, timeout=0.4, retries=1)
        began = time.monotonic()
        with pytest.raises(RetrievalError, match=r"asked 2 times, and it did not answer within 0\.4 seconds\."):
            retriever.search(["cup"], 1)
        assert 0.8 <= time.monotonic() - began < 3
        assert retriever.counts == SearchCounts(queries=1, requests=2, retries=1, failures=1)


def test_after_a_hanging_server_a_good_one_is_heard():
    with ScriptedServer(hang, GOOD) as server:
        assert client(server, timeout=0.4).search(["cup"], 1) == FOUND


def test_an_answer_that_is_too_large_is_not_read():
    with ScriptedServer(reply(200, results([{"id": "1", "contents": "x" * 5000}]))) as server:
        with pytest.raises(RetrievalError, match=r"asked once, and its answer is larger than max_bytes=1000\."):
            client(server, max_bytes=1000).search(["x"], 1)
        assert client(server, max_bytes=10_000).search(["x"], 1)[0][0].title == "x" * 5000


def test_nobody_there():
    with ScriptedServer(GOOD) as server:
        pass
    retriever = client(server, retries=1)
    with pytest.raises(RetrievalError, match=r"asked 2 times, and no answer came \(.*Connection refused\)"):
        retriever.search(["cup"], 1)
    with pytest.raises(RetrievalError, match="no answer came"):
        HTTPRetriever("http://no-such-host.invalid", retries=0, timeout=2).search(["cup"], 1)


def test_what_was_found_is_not_asked_for_again():
    with ScriptedServer(reply(200, results([CUP])), reply(200, results([])), GOOD) as server:
        retriever = client(server)
        assert [retriever.search(["cup"], 1) for _ in range(3)] == [FOUND] * 3
        assert retriever.search(["cup"], 2) == [[]]  # another number of passages is another question
        assert retriever.search(["cup", "new", "cup", "new"], 1) == [FOUND[0]] * 4
        assert [body["queries"] for body in server.bodies] == [["cup"], ["cup"], ["new"]]
        assert retriever.counts == SearchCounts(queries=8, requests=3, cache_hits=4)
        copy = pickle.loads(pickle.dumps(retriever))
        assert copy.counts == SearchCounts()
        assert copy.search(["cup"], 1) == FOUND
        assert copy.counts.requests == 1
        uncached = client(server, cache_size=0)
        assert [uncached.search(["cup"], 1) for _ in range(2)] == [FOUND] * 2
        assert uncached.counts == SearchCounts(queries=2, requests=2)


def test_failures_are_not_remembered():
    with ScriptedServer(reply(400, "no"), GOOD) as server:
        retriever = client(server)
        with pytest.raises(RetrievalError):
            retriever.search(["cup"], 1)
        assert retriever.search(["cup"], 1) == FOUND
        assert retriever.counts == SearchCounts(queries=2, requests=2, failures=1)


def test_the_least_recently_used_answers_leave_first():
    source = Listed({query: [Passage(query, query, "")] for query in "abc"})
    retriever = CachedRetriever(source, cache_size=2)
    for query in "abac":
        retriever.search([query], 1)
    source.asked.clear()
    for query in "acb":
        assert retriever.search([query], 1) == [[Passage(query, query, "")]]
    assert source.asked == [(("b",), 1)]
    assert retriever.counts == SearchCounts(queries=7, cache_hits=3)
    assert retriever.counts.as_metrics()["cache_hits"] == 3
    with pytest.raises(UserError, match="cache_size=-1"):
        CachedRetriever(source, cache_size=-1)


def test_what_a_caller_does_to_an_answer_stays_with_it():
    retriever = CachedRetriever(Listed({"a": [Passage("a", "a", "")]}))
    retriever.search(["a"], 1)[0].clear()
    assert len(retriever.search(["a"], 1)[0]) == 1


def test_threads_share_a_client():
    with ScriptedServer(GOOD) as server:
        retriever = client(server, cache_size=0)
        answers: list[object] = []
        threads = [
            threading.Thread(target=lambda: answers.extend(retriever.search(["cup"], 1) for _ in range(10)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [FOUND] * 80
        assert retriever.counts == SearchCounts(queries=80, requests=80)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/retrieve"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/retrieve"),
        ("http://search/retrieve", "http://search:80/retrieve"),
        ("https://search/a/b", "https://search:443/a/b/retrieve"),
        ("http://[::1]:8000", "http://[::1]:8000/retrieve"),
    ],
)
def test_addresses(url, expected):
    assert HTTPRetriever(url).url == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
        "http://x:port",
        "http://x:99999",
        "http://[::1",
        "http://x/?a=b",
        "http://a..b",
        "http://x/ü",
        "http://x/a b",
        "http://x\n/",
        "http://me:secret@x",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match=r"is no address of a search server.*http://127\.0\.0\.1:8000"):
        HTTPRetriever(url)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"backoff": -1}, {"max_bytes": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match="is out of range"):
        HTTPRetriever("http://127.0.0.1:8000", **options)


def test_a_server_that_is_killed_and_started_again(tmp_path: Path):
    """Failures while it is away, answers again from when it is back; a search that is under way waits for it."""
    pytest.importorskip("bm25s", reason="needs the search extra: pip install 'lit-agentrl[search]'")
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    started: list[subprocess.Popen[str]] = []
    with serving(corpus, "--port", "0") as (server, url):
        retriever = HTTPRetriever(url, timeout=5, retries=0, cache_size=0)
        found = retriever.search(["blue cup"], 2)
        assert [passage.id for passage in found[0]] == ["blue", "red"]
        server.kill()
        server.wait()
        with pytest.raises(RetrievalError, match=r"no answer came \("):
            retriever.search(["blue cup"], 2)
        timer = threading.Timer(0.3, lambda: started.append(start_server(corpus, "--port", url.rsplit(":", 1)[1])))
        timer.start()
        try:
            patient = HTTPRetriever(url, timeout=5, retries=8, backoff=0.2)  # waits 51 seconds at most
            assert patient.search(["blue cup"], 2) == found
            assert patient.counts.retries == patient.counts.requests - 1 > 0
            assert address(started[0]) == url
            assert retriever.search(["blue cup"], 2) == found
        finally:
            timer.join()
            started[0].kill()
            started[0].communicate()
    assert retriever.counts == SearchCounts(queries=3, requests=3, failures=1)
