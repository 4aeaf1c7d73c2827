"""BM25 over a corpus: the formula, real questions, and one index for many processes."""

import json
import math
import pickle
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import BM25Retriever, CachedRetriever, Passage, RetrievalError, bm25
from lit_agentrl.retrieval.bm25_index import BM25Index, best, build_index
from lit_agentrl.retrieval.words import stem, tokenize
from retrieval_parts import HOTPOTQA, PAGES, ROOT, recall, run_python, write_corpus

pytest.importorskip("bm25s", reason="needs the search extra: pip install 'lit-agentrl[search]'")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus.jsonl")


def slow_bm25(texts: list[str], query: str) -> list[float]:
    """Lucene's BM25, word by word."""
    documents = [tokenize(text) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        total = 0.0
        for word in tokenize(query):
            containing = sum(word in other for other in documents)
            if containing:
                idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
                frequency = words.count(word)
                total += idf * frequency / (frequency + 0.9 * (1 - 0.4 + 0.4 * len(words) / average))
        scores.append(total)
    return scores


def test_search_is_bm25(tmp_path):
    """Scores, order and number of results equal those of the slow twin."""
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(60)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 30))) for _ in range(120)]
    build_index(texts, tmp_path)
    index = BM25Index(tmp_path)
    for _ in range(30):
        query = " ".join(rng.choices([*vocabulary, "unknown"], k=rng.randint(1, 6)))
        expected = slow_bm25(texts, query)
        found = index.search(query, 50)
        assert len(found) == min(50, sum(s > 0 for s in expected))
        assert [expected[row] for row, _ in found] == pytest.approx([score for _, score in found], rel=1e-5)
        assert [score for _, score in found] == pytest.approx(sorted(expected, reverse=True)[: len(found)], rel=1e-5)


def test_equal_scores_keep_the_order_of_the_texts(tmp_path):
    build_index(["red cup"] * 70 + ["red red cup"], tmp_path)
    index = BM25Index(tmp_path)
    assert [row for row, _ in index.search("RED", 50)] == [70, *range(49)]
    assert index.search("green", 50) == index.search("the !", 50) == ()


def test_best_is_a_sort():
    rng = np.random.default_rng(0)
    for size in (1, 3, 10, 200):
        scores = rng.integers(0, 4, size).astype(np.float32)
        order = sorted((row for row in range(size) if scores[row] > 0), key=lambda row: (-scores[row], row))
        assert best(scores, 10) == tuple(order[:10])


def test_texts_without_words_can_be_indexed(tmp_path):
    build_index(["!", ""], tmp_path)
    assert BM25Index(tmp_path).search("anything", 50) == ()


def test_words():
    assert tokenize("The Women's T-SHIRTS for 2 parties, in wood-box_es") == [
        "women", "s", "t", "shirt", "2", "party", "wood", "box", "es",
    ]  # fmt: skip
    assert [stem(word) for word in ("dresses", "dress", "shoes", "bus", "ties", "gas")] == [
        "dresse", "dress", "shoe", "bus", "ty", "ga",
    ]  # fmt: skip


def test_five_pages_by_hand(corpus, tmp_path):
    """Two of five hold the word: idf = ln(1 + 3.5 / 2.5). They have 5, 6, 5, 3 and 7 words, stop words apart."""
    found = BM25Retriever(corpus, str(tmp_path / "index")).search(["Birds"], 3)
    idf = math.log(1 + 3.5 / 2.5)
    average = (5 + 6 + 5 + 3 + 7) / 5
    bird = idf * 3 / (3 + 0.9 * (0.6 + 0.4 * 7 / average))  # "Bird", "Birds" and "bird"
    song = idf * 1 / (1 + 0.9 * (0.6 + 0.4 * 3 / average))
    assert [[(passage.id, passage.score) for passage in passages] for passages in found] == [
        [("bird", pytest.approx(bird, rel=1e-5)), ("song", pytest.approx(song, rel=1e-5))]
    ]


def test_the_slow_twin_finds_the_same(corpus, tmp_path):
    retriever = BM25Retriever(corpus, str(tmp_path / "index"))
    texts = [f"{title} {text}" for _, title, text in PAGES]
    for query in ("cup", "blue cups", "a song of the birds", "oak saucer blue blue", "nothing"):
        (found,) = retriever.search([query], 5)
        expected = slow_bm25(texts, query)
        order = sorted((row for row in range(5) if expected[row] > 0), key=lambda row: -expected[row])
        assert [passage.id for passage in found] == [PAGES[row][0] for row in order]
        assert [passage.score for passage in found] == pytest.approx([expected[row] for row in order], rel=1e-5)


def test_both_numbers_of_the_formula_count(corpus, tmp_path):
    """Without both, a word counts its idf, however often it stands in however long a page."""
    (found,) = BM25Retriever(corpus, str(tmp_path), k1=0, b=0).search(["bird"], 5)
    assert [(passage.id, passage.score) for passage in found] == [
        ("song", pytest.approx(math.log(1 + 3.5 / 2.5))),
        ("bird", pytest.approx(math.log(1 + 3.5 / 2.5))),
    ]
    ((first, *_),) = BM25Retriever(corpus, str(tmp_path)).search(["bird"], 5)
    assert first.id == "bird"


def test_passages_and_pages(corpus, tmp_path):
    retriever = BM25Retriever(corpus, str(tmp_path / "index"))
    assert len(retriever) == 5
    assert [len(found) for found in retriever.search(["cup", "zebra", "the", ""], 2)] == [2, 0, 0, 0]
    assert retriever.search([], 2) == []
    assert [len(found) for found in retriever.search(["cup"], 100)] == [3]
    assert retriever.open("table") == Passage("table", "Table", "Tables of oak hold cups.")
    with pytest.raises(RetrievalError, match="there is no page 'chair'"):
        retriever.open("chair")
    with pytest.raises(UserError, match="top_k=0"):
        retriever.search(["cup"], 0)


@pytest.mark.parametrize("options", [{"k1": -0.1}, {"b": 1.1}, {"b": -1}])
def test_numbers_out_of_range_are_refused(options, corpus):
    with pytest.raises(UserError, match=r"is out of range"):
        BM25Retriever(corpus, **options)


def test_a_missing_package_names_the_extra(corpus, monkeypatch):
    monkeypatch.setattr(bm25, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`bm25s`.*pip install 'lit-agentrl\[search\]'"):
        BM25Retriever(corpus)


def test_packages_are_not_imported_before_a_search():
    packages = {"bm25s", "faiss", "torch", "sentence_transformers"}
    code = f"import sys, lit_agentrl.retrieval; print({packages} & set(sys.modules))"
    assert run_python(code).stdout == "set()\n"


def test_a_changed_corpus_is_indexed_anew(corpus, tmp_path):
    folder = str(tmp_path / "index")
    assert BM25Retriever(corpus, folder).search(["zebra"], 3) == [[]]
    write_corpus(Path(corpus), [*PAGES, ("z", "Zebra", "Striped.")])
    assert BM25Retriever(corpus, folder).search(["zebra"], 3)[0][0].title == "Zebra"


def test_a_copy_opens_what_is_there(corpus, tmp_path, monkeypatch):
    """Pickling carries paths; the copy neither builds nor holds the corpus."""
    retriever = BM25Retriever(corpus, str(tmp_path / "index"))
    found = retriever.search(["cup"], 3)
    packed = pickle.dumps(retriever)
    assert len(packed) < 1000
    monkeypatch.setattr(bm25, "build_index", lambda *arguments: pytest.fail("built again"))
    assert pickle.loads(packed).search(["cup"], 3) == found


def test_threads_share_a_retriever(corpus, tmp_path):
    retriever = BM25Retriever(corpus, str(tmp_path / "index"))
    expected = BM25Retriever(corpus, str(tmp_path / "index")).search(["cup", "bird"], 3)
    wrong: list[object] = []

    def search() -> None:
        for _ in range(50):
            if (found := retriever.search(["cup", "bird"], 3)) != expected:
                wrong.append(found)

    threads = [threading.Thread(target=search) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


WORKERS = """
import json, multiprocessing, sys, time
from pathlib import Path
from typing import Any
from lit_agentrl.retrieval import BM25Retriever

class Noted(BM25Retriever):
    def build(self, path, size, folder):
        with open(sys.argv[3], "a") as file:
            file.write("built\\n")
        time.sleep(0.3)
        super().build(path, size, folder)

def work(retriever, barrier, answers):
    barrier.wait()
    found = retriever.search(["blue cup"], 3)
    barrier.wait()  # all have it open at the same time
    maps = Path("/proc/self/maps").read_text()
    answers.put([[p.id for p in found[0]], "data.csc.index.npy" in maps and "words_hashes.npy" in maps])

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[4])
    barrier, answers = context.Barrier(3), context.Queue()
    retriever = Noted(sys.argv[1], sys.argv[2])
    workers = [context.Process(target=work, args=(retriever, barrier, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    print(json.dumps([answers.get(timeout=60) for _ in workers]))
    for worker in workers:
        worker.join()
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process maps")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_that_start_together_build_one_index_and_map_it(start, corpus, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    if start == "spawn":
        code = "import subprocess, sys; raise SystemExit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    done = run_python(code, str(script), corpus, str(tmp_path / "index"), str(tmp_path / "builds"), start)
    assert json.loads(done.stdout) == [[["blue", "red", "table"], True]] * 3
    assert (tmp_path / "builds").read_text() == "built\n"


@pytest.mark.skipif(not HOTPOTQA.is_dir(), reason="the real HotpotQA pages are not beside the checkout")
def test_questions_of_hotpotqa_find_their_pages():
    """700 real pages, 70 questions with 2 supporting pages each: 0.56, 0.67 and 0.91 were measured."""
    retriever = BM25Retriever(str(HOTPOTQA / "corpus.jsonl"))
    assert len(retriever) == 700
    assert recall(retriever, 3) > 0.5
    assert recall(retriever, 5) > 0.62
    assert recall(retriever, 10) > 0.85
    titles = [passage.title for passage in retriever.search(["VIVA Media AG"], 3)[0]]
    assert titles[0] == "VIVA Media"


def test_the_documented_retriever_runs():
    """The block of docs/retrieval.md, under the cache that counts for it."""
    text = (ROOT / "docs" / "retrieval.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    retriever = CachedRetriever(names["GlossaryRetriever"]({"robot": "A made-up worker."}))
    assert retriever.search(["what is a robot", "a play"], 1) == [[Passage("robot", "robot", "A made-up worker.")], []]
    with pytest.raises(RetrievalError, match="the glossary is empty"):
        names["GlossaryRetriever"]({}).search(["x"], 1)
