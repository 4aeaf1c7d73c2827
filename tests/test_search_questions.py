"""Question files in the layouts of the field, their splits, and the real HotpotQA files."""

import importlib
import json
import logging
import os
import pickle
from pathlib import Path

import pytest

from lit_agentrl.envs import SearchSuite, WebSuite
from lit_agentrl.envs.search.environment import plain_title
from lit_agentrl.envs.search.questions import Question, read_questions
from lit_agentrl.envs.search.splits import QuestionFiles, position, question_table
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import BM25Retriever
from search_parts import Library, write_questions

HOTPOTQA = Path(__file__).parent.parent.parent / "shared" / "data" / "hotpotqa"

PROMPT = [
    {
        "role": "user",
        "content": "Question: none? Answer. For example, <answer> Beijing </answer>. Question: who is it?\n",
    }
]
TITLES = ("A", "B")
LAYOUTS = {
    "flat": {"id": "7", "question": "who?", "golden_answers": ["x", "y"], "data_source": "nq", "type": "bridge"},
    "one answer": {"id": "7", "question": "who?", "answer": "x", "data_source": "nq"},
    "flashrag": {
        "id": "train_7",
        "question": "who?",
        "golden_answers": ["x"],
        "metadata": {"type": "bridge", "supporting_facts": {"title": ["A", "A", "B"], "sent_id": [0, 1, 0]}},
    },
    "search-r1": {
        "id": "train_7",
        "data_source": "nq",
        "prompt": PROMPT,
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["x", "y"]}},
        "extra_info": {"split": "train", "index": 7},
    },
    "hotpotqa": {
        "_id": "5a7",
        "question": "who?",
        "answer": "x",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [["A", 0], ["A", 1], ["B", 0]],
        "context": [["A", ["One.", "Two."]]],
    },
}
EXPECTED = {
    "flat": Question("7", "nq", "who?", ("x", "y"), "bridge"),
    "one answer": Question("7", "nq", "who?", ("x",)),
    "flashrag": Question("train_7", "file", "who?", ("x",), "bridge", TITLES),
    "search-r1": Question("train_7", "nq", "who is it?", ("x", "y")),
    "hotpotqa": Question("5a7", "file", "who?", ("x",), "bridge", TITLES),
}


def write_lines(folder: Path, records) -> Path:
    return Path(write_questions(folder, records, "file.jsonl"))


def write_json(folder: Path, records) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def write_parquet(folder: Path, records) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the parquet extra: pip install 'lit-agentrl[parquet]'")
    parquet = importlib.import_module("pyarrow.parquet")
    path = folder / "file.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


FILES = [(kind, layout) for kind in ("jsonl", "json", "parquet") for layout in LAYOUTS]
FILES.remove(("parquet", "hotpotqa"))  # pairs of text and number have no Parquet type


@pytest.mark.parametrize(("kind", "layout"), FILES)
def test_every_layout_is_read(tmp_path, kind, layout):
    record, expected = LAYOUTS[layout], EXPECTED[layout]
    write = {"jsonl": write_lines, "json": write_json, "parquet": write_parquet}[kind]
    assert read_questions([write(tmp_path, [record])]) == [expected]


def test_keys_and_kinds():
    assert EXPECTED["flat"].key == "nq/7"
    assert EXPECTED["flat"].kind == "nq/bridge"
    assert EXPECTED["search-r1"].kind == "nq"


def test_answers_of_every_type_are_text(tmp_path):
    answers = [["a ", "a", " ", None, 1969, True], False, "z"]
    records = [{"id": str(i), "question": "q", "golden_answers": given} for i, given in enumerate(answers)]
    found = read_questions([Path(write_questions(tmp_path, records))])
    assert [question.answers for question in found] == [("a", "1969", "yes"), ("no",), ("z",)]


def test_rows_without_ids_are_told_apart_by_their_place(tmp_path):
    """Search-R1's group ids once were equal over sources, which pooled groups that have nothing in common (R11)."""
    record = {"question": "q", "golden_answers": ["a"], "data_source": "s"}
    paths = [Path(write_questions(tmp_path, [record, record], name)) for name in ("one.jsonl", "two.jsonl")]
    assert [question.key for question in read_questions(paths)] == ["s/one-1", "s/one-2", "s/two-1", "s/two-2"]


def test_one_id_in_two_sources_is_two_questions(tmp_path):
    records = [
        {"id": "train_0", "question": "q", "answer": "a", "data_source": source} for source in ("nq", "hotpotqa")
    ]
    assert [q.key for q in read_questions([Path(write_questions(tmp_path, records))])] == [
        "nq/train_0",
        "hotpotqa/train_0",
    ]


GOOD = '{"id": "1", "question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.jsonl", "", "holds no question"),
        ("x.jsonl", "\n\n", "holds no question"),
        ("x.json", "[]", "holds no question"),
        ("x.jsonl", GOOD + "\n{oops\n", "x.jsonl, line 3"),
        ("x.jsonl", GOOD + "[1]\n", "x.jsonl, line 2: a question must be an object"),
        ("x.jsonl", GOOD + '{"id": "2", "answer": "a"}\n', "line 2: there is no question.* the record has answer, id"),
        ("x.jsonl", GOOD + '{"id": "2", "question": "q"}\n', "line 2: there is no answer"),
        ("x.jsonl", GOOD + '{"id": "2", "question": "q", "golden_answers": [""]}\n', "line 2: there is no answer"),
        ("x.jsonl", GOOD + '{"id": "2", "question": " ", "answer": "a"}\n', "line 2: there is no question"),
        (
            "x.jsonl",
            GOOD + '{"id": "2", "prompt": [{"content": "Hi"}], "answer": "a"}\n',
            "line 2: there is no question",
        ),
        ("x.jsonl", GOOD + GOOD, r"line 2: the id 'x/1' was already given to .*x.jsonl, line 1"),
        ("x.json", '[{"id": "1"}]', "entry 1: there is no question"),
        ("x.json", "[" + GOOD, "x.json, line 2"),
        ("x.json", GOOD, r"'\[' expected"),
        ("x.csv", "q,a", "ends in .parquet, .jsonl, .json"),
        ("x.parquet", "PAR1 no", "x.parquet, after row 0: not the Parquet file"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, text, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs the parquet extra: pip install 'lit-agentrl[parquet]'")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        SearchSuite(str(tmp_path / name), Library())


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b'{"question": "\xff"}\n')
    with pytest.raises(UserError, match="line 2"):
        SearchSuite(str(tmp_path / "x.jsonl"), Library())
    (tmp_path / "y.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # a mark of Windows editors
    assert SearchSuite(str(tmp_path / "y.jsonl"), Library(), val_share=0, test_share=0).tasks("train") == ["train-y/1"]


def test_a_missing_file_and_a_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none.jsonl is not there"):
        SearchSuite(str(tmp_path / "none.jsonl"), Library())
    with pytest.raises(UserError, match="name at least one"):
        SearchSuite([], Library())
    (tmp_path / "x.parquet").write_text("")
    monkeypatch.setattr("lit_agentrl.envs.search.records.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Reading x.parquet needs the package `pyarrow`.*lit-agentrl\[parquet\]"):
        SearchSuite(str(tmp_path / "x.parquet"), Library())


def records(count: int, source: str = "s") -> list[dict[str, object]]:
    return [{"id": str(n), "question": f"{source} {n}?", "answer": "a", "data_source": source} for n in range(count)]


def test_a_question_keeps_its_split_whatever_else_is_in_the_file(tmp_path):
    """Shares by hash: about 10 % and 20 % of 500, and the same for a part of the file in another order."""
    every = SearchSuite(write_questions(tmp_path, records(500), "all.jsonl"), Library(), val_share=0.2)
    few = SearchSuite(write_questions(tmp_path, records(500)[300:100:-1], "few.jsonl"), Library(), val_share=0.2)
    sizes = {split: len(every.tasks(split)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 500
    assert 75 <= sizes["val"] <= 125
    assert 30 <= sizes["test"] <= 70
    for split in sizes:
        assert set(few.tasks(split)) <= set(every.tasks(split))
    assert position("s/0") == position("s/0") != position("s/1")
    assert all(position(f"s/{n}") < 0.1 for n in range(500) if f"test-s/{n}" in every.tasks("test"))


def test_given_files_are_the_splits(tmp_path):
    train, val, test = (write_questions(tmp_path, records(40, name), f"{name}.jsonl") for name in ("a", "b", "c"))
    suite = SearchSuite(train, Library(), val_questions=[val], test_questions=test)
    assert [len(suite.tasks(split)) for split in ("train", "val", "test")] == [40, 40, 40]
    assert suite.tasks("val")[:2] == ["val-b/0", "val-b/1"]
    half = SearchSuite([train, test], Library(), val_questions=val)
    assert len(half.tasks("val")) == 40
    assert len(half.tasks("train")) + len(half.tasks("test")) == 80
    assert half.tasks("test")
    assert half.kind("val-b/0") == "b"
    with pytest.raises(UserError, match="task='val-b/40'"):
        half.make("val-b/40")
    with pytest.raises(UserError, match="split='dev'"):
        half.tasks("dev")


@pytest.mark.parametrize("shares", [(-0.1, 0), (0, 1), (0.5, 0.5)])
def test_shares_out_of_range_are_refused(tmp_path, shares):
    with pytest.raises(UserError, match="share"):
        SearchSuite(write_questions(tmp_path), Library(), val_share=shares[0], test_share=shares[1])


def test_held_out_questions_that_are_trained_on_are_counted(tmp_path, caplog):
    train, test = (write_questions(tmp_path, records(5), f"{name}.jsonl") for name in ("train", "test"))
    with caplog.at_level(logging.INFO):
        SearchSuite(train, Library(), test_questions=test, val_share=0)
    assert "5 train, 0 val, 5 test; also asked in train: 0 of val, 5 of test" in caplog.text


def test_files_are_read_once_and_not_pickled(tmp_path, monkeypatch):
    """A suite goes to every worker process; the questions of NQ and HotpotQA are 170,000."""
    path = write_questions(tmp_path, records(300))
    suite = SearchSuite(path, Library())
    monkeypatch.setattr("lit_agentrl.envs.search.splits.read_questions", lambda paths: pytest.fail("read again"))
    assert WebSuite(path, Library()).tasks("train") == suite.tasks("train")
    assert suite.make("train-s/1").reset().text.endswith("s 1?\n")
    assert len(pickle.dumps(suite)) < 5000


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_questions(tmp_path, records(3))
    files = QuestionFiles((path,), val_share=0, test_share=0)
    assert len(question_table(files, files.stamp)["train"]) == 3
    write_questions(tmp_path, records(4))
    os.utime(path, ns=(1, 1))
    assert len(question_table(files, files.stamp)["train"]) == 4


@pytest.fixture(scope="module")
def hotpotqa() -> str:
    if not (HOTPOTQA / "questions.jsonl").is_file():
        pytest.skip("the real HotpotQA files are not beside the checkout")
    return str(HOTPOTQA / "questions.jsonl")


@pytest.fixture(scope="module")
def corpus(hotpotqa) -> BM25Retriever:
    pytest.importorskip("bm25s", reason="needs the search extra: pip install 'lit-agentrl[search]'")
    return BM25Retriever(str(HOTPOTQA / "corpus.jsonl"))


def test_the_real_questions(hotpotqa, corpus):
    suite = SearchSuite(hotpotqa, corpus)
    tasks = {split: suite.tasks(split) for split in ("train", "val", "test")}
    assert sum(map(len, tasks.values())) == 70
    assert all(tasks.values())
    kinds = [suite.kind(task) for split in tasks.values() for task in split]
    assert (kinds.count("hotpotqa/bridge"), kinds.count("hotpotqa/comparison")) == (58, 12)
    assert all(len(suite.question(task).titles) == 2 for split in tasks.values() for task in split)


@pytest.mark.parametrize("kind", [SearchSuite, WebSuite])
def test_real_walkthroughs_earn_the_full_reward_and_find_what_they_name(hotpotqa, corpus, kind):
    """Its searches are by title, so they find nearly all of the 140 supporting pages."""
    suite = kind(hotpotqa, corpus, val_share=0, test_share=0)
    recall = []
    for task in suite.tasks("train"):
        environment = suite.make(task)
        environment.reset()
        for _, reply in suite.walkthrough(task):
            observation, reward, done = environment.step(reply)
            assert observation.valid
        assert (reward, done, environment.success) == (1.0, True, True)
        recall.append(environment.metrics["gold_recall"])
    assert sum(recall) / len(recall) > 0.9


def test_real_titles_are_all_in_the_corpus(hotpotqa, corpus):
    """So `gold_recall` can reach 1."""
    suite = SearchSuite(hotpotqa, corpus, val_share=0, test_share=0)
    held = {plain_title(corpus.open(str(row)).title) for row in range(len(corpus))}
    wanted = {plain_title(title) for task in suite.tasks("train") for title in suite.question(task).titles}
    assert wanted <= held
