"""Search-R1's corpora: reading, broken files, passages by row and id; and stores that are whole or not there."""

import hashlib
import json
import os
import tracemalloc
from array import array
from pathlib import Path

import pytest

from lit_agentrl import cache
from lit_agentrl.cache import built_once, content_digest
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import corpus as corpus_module
from lit_agentrl.retrieval import keys
from lit_agentrl.retrieval.base import Passage, RetrievalError
from lit_agentrl.retrieval.corpus import Corpus, check_corpus, passage, read_corpus
from lit_agentrl.retrieval.keys import KeyTable, hash_all
from retrieval_parts import PAGES, run_python, write_corpus


def opened(path: Path, folder: Path) -> Corpus:
    return Corpus(path, content_digest(path), folder)


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Red cup"\nA cup.', "Red cup", "A cup."),
        ("Red cup\nA cup.\nOf clay.", "Red cup", "A cup.\nOf clay."),
        ('""Heroes" (album)"\nBy D. B.', '"Heroes" (album)', "By D. B."),
        ('"\nx', '"', "x"),
        ("only one line", "only one line", ""),
        ("", "", ""),
    ],
)
def test_the_first_line_without_its_quotes_is_the_title(contents, title, text):
    assert passage("1", contents) == Passage("1", title, text)


def test_contents_give_the_passage_again():
    for id, title, text in PAGES:
        found = Passage(id, title, text, 1.5)
        assert passage(id, found.contents, 1.5) == found


def test_passages_by_row_and_by_id(tmp_path):
    """Whatever the bytes before them: other scripts, escapes, empty lines, a byte order mark, no last line break."""
    path = tmp_path / "corpus.jsonl"
    lines = [
        json.dumps({"id": 7, "contents": '"Čapek"\nRobots, 機械'}, ensure_ascii=False),
        "",
        json.dumps({"id": "8", "contents": '"Čapek"\nRobots, 機械'}),
        "   ",
        json.dumps({"id": "a b", "contents": "x\ny", "more": [1]}),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = opened(path, tmp_path)
    assert len(found) == 3
    assert found.passage(0, 2.5) == Passage("7", "Čapek", "Robots, 機械", 2.5)
    assert found.find("8") == Passage("8", "Čapek", "Robots, 機械")
    assert found.find("a b") == Passage("a b", "x", "y")
    assert found.find("9") is None
    assert [record.id for record in read_corpus(path)] == ["7", "8", "a b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "2", "text": "x"}', "no text under `contents`.*id, text"),
        ('{"id": "2", "contents": null}', "no text under `contents`"),
        ('{"contents": "x"}', "`id` should be text"),
        ('{"id": "", "contents": "x"}', "`id` should be text"),
        ('{"id": true, "contents": "x"}', "`id` should be text.*True"),
        ('{"id": 1.5, "contents": "x"}', "`id` should be text.*1.5"),
        ('{"id": "2", "contents": "x', "no JSON"),
        ('["id", "contents"]', "no JSON object but list"),
        ("[" * 100_000, "no JSON"),
        ('{"id": "2", "contents": "\udcff"}', "no JSON"),
        ('{"id": "1", "contents": "x"}', "the id '1' was already given to line 1"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    path = tmp_path / "corpus.jsonl"
    whole = '{"id": "1", "contents": "x"}\n\n'
    path.write_bytes((whole + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"corpus.jsonl, line 3: .*{message}"):
        opened(path, tmp_path)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == ["corpus.jsonl"]
    path.write_text(whole)
    assert len(opened(path, tmp_path)) == 1


def test_a_corpus_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing.jsonl' cannot be read \(No such file"):
        check_corpus(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        check_corpus(str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no passage"):
        check_corpus(str(tmp_path / "empty.jsonl"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(8000):
            file.write(json.dumps({"id": number, "contents": "x" * 500}) + "\n")  # 4 MB
    tracemalloc.start()
    assert sum(len(record.contents) for record in read_corpus(path)) == 4_000_000
    assert tracemalloc.get_traced_memory()[1] < 400_000
    tracemalloc.stop()


def test_keys_that_share_a_hash_are_told_apart(tmp_path, monkeypatch):
    """With a hash of 2 bits nearly all ids collide; only an id that is really there twice is refused."""
    narrow = lambda key: keys.hashed(key) % 4  # noqa: E731
    monkeypatch.setattr(corpus_module, "hashed", narrow)
    pages = [(f"page {number}", f"Title {number}", "x") for number in range(50)]
    path = Path(write_corpus(tmp_path / "corpus.jsonl", pages))
    found = opened(path, tmp_path)
    monkeypatch.setattr(keys, "hashed", lambda key, wide=keys.hashed: wide(key) % 4)
    assert [found.find(id) for id, _, _ in pages] == [Passage(*page) for page in pages]
    assert found.find("page 50") is None
    write_corpus(path, [*pages, pages[7]])
    with pytest.raises(UserError, match="line 51: the id 'page 7' was already given to line 8"):
        opened(path, tmp_path)


def test_a_key_table_is_a_dictionary(tmp_path):
    words = [f"word {number}" for number in range(1000)]
    assert KeyTable.write(hash_all(words), tmp_path, "words") == []
    table = KeyTable(tmp_path, "words")
    assert len(table) == 1000
    assert [table.rows(word) for word in words] == [[row] for row in range(1000)]
    assert table.rows("word 1000") == table.rows("") == table.rows("\ud800") == []
    assert KeyTable.write(array("Q", [5, 2, 5, 9, 2, 5]), tmp_path, "repeated") == [[1, 4], [0, 2, 5]]


def test_a_file_that_changes_under_a_search_is_noticed(tmp_path):
    """Offsets of the old file must never cut passages out of the new one."""
    path = Path(write_corpus(tmp_path / "corpus.jsonl"))
    found = opened(path, tmp_path)
    write_corpus(path, [("new", "New page", "One line that is a little longer than it was."), *PAGES])
    for row in range(len(PAGES)):
        with pytest.raises(RetrievalError, match="was changed while it was searched"):
            found.passage(row)


def test_a_replaced_file_is_read_as_it_was(tmp_path):
    path = Path(write_corpus(tmp_path / "corpus.jsonl"))
    found = opened(path, tmp_path)
    write_corpus(tmp_path / "other.jsonl", PAGES[::-1])
    (tmp_path / "other.jsonl").rename(path)
    assert [found.passage(row).id for row in range(len(PAGES))] == [id for id, _, _ in PAGES]
    assert opened(path, tmp_path).passage(0).id == PAGES[-1][0]


def test_a_store_is_built_once_and_whole(tmp_path):
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_text("1")
        if len(calls) == 1:
            raise RuntimeError("half way")
        (folder / "b").write_text("2")

    with pytest.raises(RuntimeError, match="half way"):
        built_once(tmp_path / "store", build)
    assert os.listdir(tmp_path) == ["store.lock"]
    for _ in range(2):
        store = built_once(tmp_path / "store", build)
        assert sorted(os.listdir(store)) == ["a", "b"]
    assert len(calls) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from lit_agentrl.cache import built_once

def build(folder):
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)

built_once(Path(sys.argv[1]), build)
"""


def test_a_killed_build_leaves_nothing_half_made(tmp_path):
    store = tmp_path / "store"
    assert run_python(KILLED, str(store), check=False).returncode == -9
    assert not store.exists()
    assert len(list(tmp_path.glob(".store-*/half"))) == 1  # what it left, which the next build removes
    built_once(store, lambda folder: (folder / "whole").touch())
    assert os.listdir(store) == ["whole"]
    assert sorted(os.listdir(tmp_path)) == ["store", "store.lock"]


def test_a_folder_that_cannot_be_written_is_the_users_to_change(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*LIT_AGENTRL_CACHE"):
        built_once(tmp_path / "file" / "store", lambda folder: None)


def test_the_digest_is_that_of_the_contents(tmp_path, monkeypatch):
    """Remembered or not, before and after a change."""
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    expected = {text: hashlib.sha256(text.encode()).hexdigest() for text in ("one", "two")}
    path.write_text("one")
    assert content_digest(path) == expected["one"]
    assert not (tmp_path / "cache").exists()  # small files are read again
    monkeypatch.setattr(cache, "REMEMBERED_BYTES", 1)
    assert content_digest(path) == expected["one"]
    assert os.listdir(tmp_path / "cache" / "digests") == ["lock"]  # changed a moment ago: it may change again
    path.write_text("two")
    assert content_digest(path) == expected["two"]
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    assert content_digest(path) == content_digest(path) == expected["two"]
    assert len(os.listdir(tmp_path / "cache" / "digests")) == 2
    monkeypatch.setattr(cache, "_sha256", lambda path: pytest.fail("read again"))
    assert content_digest(path) == expected["two"]
    os.utime(path, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        content_digest(path)
