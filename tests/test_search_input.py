"""What is wrong with files, servers or shapes of a search run is said in one sentence, before a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lit_agentrl.cli import main
from retrieval_parts import write_corpus
from search_parts import RECORDS, write_questions

pytest.importorskip("bm25s", reason="needs the search extra: pip install 'lit-agentrl[search]'")


def refusal(folder: Path, lm: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The sentence with which a fit on the files of `folder` is refused."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    if not (folder / "library.jsonl").exists():
        write_questions(folder)
    retriever = {"class_path": "BM25Retriever", "init_args": {"corpus": str(corpus)}}
    suite = {"questions": str(folder / "library.jsonl"), "retriever": retriever, "val_share": 0.0, "test_share": 0.0}
    data = {
        "environment": {"class_path": "SearchSuite", "init_args": suite},
        "rollout": {"class_path": "TreeRollout"},
        "chat": "inline",
        "sampling": {"max_new_tokens": 8},
    }
    config = {
        "trainer": {"default_root_dir": str(folder / "run"), "accelerator": "cpu", "max_epochs": 1},
        "model": {"class_path": "TreeGRPOModule", "init_args": {"pretrained": lm}},
        "data": {"class_path": "RolloutDataModule", "init_args": data},
        "evaluation": {"at_start": False, "at_end": False},  # nothing is held out
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(folder / "run.yaml"), *options])
    assert end.value.code == 2
    # not tracebacks: logging writes its own where a handler holds the stream of an earlier test
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1
    return told[0]


@pytest.fixture
def no_model(tiny_lm, tmp_path) -> str:
    """A model without its weights: who complains of something else has not tried to load them."""
    shutil.copytree(tiny_lm, tmp_path / "lm", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(tmp_path / "lm")


def test_a_corpus_line_without_contents(tmp_path, capsys, no_model):
    """Found while the index is built, however deep in the file."""
    good = json.dumps({"id": "1", "contents": '"Red cup"\nA cup.'})
    (tmp_path / "corpus.jsonl").write_text(good + "\n" + json.dumps({"id": "2", "text": "A table."}) + "\n")
    told = refusal(tmp_path, no_model, capsys)
    assert "corpus.jsonl, line 2: there is no text under `contents`" in told


def test_a_model_without_weights(tmp_path, capsys, no_model):
    """With good files the model is what is wrong, so the tests here can tell who came first."""
    assert "lm" in refusal(tmp_path, no_model, capsys)


def test_an_empty_corpus(tmp_path, capsys, no_model):
    (tmp_path / "corpus.jsonl").write_text("\n")
    assert "corpus.jsonl holds no passage" in refusal(tmp_path, no_model, capsys)


def test_a_question_without_an_answer(tmp_path, capsys, no_model):
    write_questions(tmp_path, [RECORDS[0], {"id": "q9", "question": "Who?"}])
    assert "library.jsonl, line 2: there is no answer" in refusal(tmp_path, no_model, capsys)


def test_a_question_file_that_is_not_there(tmp_path, capsys, no_model):
    told = refusal(tmp_path, no_model, capsys, "--data.environment.questions", str(tmp_path / "none.jsonl"))
    assert "none.jsonl is not there" in told


def test_a_server_that_is_not_there(tmp_path, capsys, no_model):
    server = ["--data.environment.retriever", "HTTPRetriever", "--data.environment.retriever.url", "http://127.0.0.1:1"]
    told = refusal(tmp_path, no_model, capsys, *server, "--data.environment.retriever.retries", "0")
    assert "search server does not answer" in told
    assert "was asked once" in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trees": 0}, "trees=0 must be at least 1"),
        ({"expansions": 0}, "expansions=0 must be at least 1"),
        ({"rounds": -1}, "rounds=-1 must be at least 0"),
        ({"keep_leaves": 4}, "keep_leaves=4: a tree has 3 leaves"),
        ({"keep_leaves": 0}, "keep_leaves=0: a tree has 3 leaves"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"trees": 1, "rounds": 0}, "group_size=1"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be(tmp_path, capsys, no_model, options, words):
    given = [word for key, value in options.items() for word in (f"--data.rollout.{key}", str(value))]
    assert words in refusal(tmp_path, no_model, capsys, *given)


def test_a_group_size_beside_the_trees(tmp_path, capsys, no_model):
    told = refusal(tmp_path, no_model, capsys, "--data.group_size", "8")
    assert "give 6 trajectories of a prompt" in told
    assert "Leave --data.group_size out" in told
