"""`lit-agentrl mine-preferences`: what it writes, that it can be stopped at any moment, and what it refuses."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lit_agentrl.cli import main
from lit_agentrl.datamodules.preference_file import read_preferences
from lit_agentrl.knowledge import FactScorer, answer_score, join, notes_part
from preference_parts import (
    DISEASES,
    QUESTIONS,
    fit_pairs,
    mined,
    mining_options,
    pair,
    talk_options,
    write_pairs,
)
from runs import metrics, run_alone, start
from test_resume import wait_for
from tiny import build_tiny_lm

TALK = ("--data.environment", "preference_parts.TalkSuite")
KINDS = {
    "tree_siblings": ("TreeSiblings", ()),
    "anchor_actions": ("AnchorActions", ()),
    "best_of_k_by_score": ("BestOfK", ()),
    "rag_vs_plain": ("RagVsPlain", ()),
    "corrupt_fact": ("CorruptFact", ("--mine.miner.answers", "reference", "--mine.filters.max_similarity", "1")),
}


@pytest.fixture(scope="module")
def long_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with room for facts, a byte a token."""
    return build_tiny_lm(tmp_path_factory.mktemp("long") / "lm", max_position_embeddings=2048)


def options_of(mode: str, lm: str, run: Path, *more: str) -> list[str]:
    miner, own = KINDS[mode]
    if mode in ("tree_siblings", "anchor_actions"):
        return mining_options(lm, run, "--mine.miner", miner, *own, *more)
    return talk_options(miner, lm, run, *own, *more)


@pytest.mark.parametrize("mode", KINDS)
def test_every_mode_writes_pairs_that_can_be_trained_on(
    mode: str, long_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's conversational columns and nothing else but images and provenance; our own reader takes all of them."""
    main(options_of(mode, long_lm, tmp_path))
    records = mined(tmp_path)
    assert f"{mode}: {len(records)} pairs" in capsys.readouterr().out
    for record in records:
        assert list(record) == ["prompt", "chosen", "rejected", "images", "provenance"]
        assert [m["role"] for m in record["prompt"]][:2] == ["system", "user"]
        assert [m["role"] for side in ("chosen", "rejected") for m in record[side]] == ["assistant"] * 2
        assert record["images"] == []
        provenance = record["provenance"]
        assert provenance["mode"] == mode
        assert provenance["gap"] >= 0.01
        assert provenance["seed"] == 0
        assert len(provenance["policy"]["sha256"]) == 64
        assert provenance["policy"]["pretrained"] == long_lm
        assert set(provenance["versions"]) == {"lit_agentrl", "torch", "transformers", "peft"}
    assert len(read_preferences(tmp_path / "preferences.jsonl")) == len(records) >= 2
    summary = json.loads((tmp_path / "preferences.summary.json").read_text())
    left_out = sum(n for reason, n in summary["counts"].items() if not reason.startswith(("tasks", "candidates")))
    assert summary["counts"]["candidates"] == len(records) + left_out
    assert not (tmp_path / "preferences.jsonl.part").exists()


@pytest.mark.parametrize("mode", ["tree_siblings", "rag_vs_plain"])
def test_the_file_depends_on_the_seed_alone(mode: str, long_lm: str, tmp_path: Path) -> None:
    """Not on what tasks are played beside; another seed gives other pairs."""
    main(options_of(mode, long_lm, tmp_path / "a"))
    main(options_of(mode, long_lm, tmp_path / "b", "--mine.batch_tasks", "5"))
    main(options_of(mode, long_lm, tmp_path / "c", "--seed_everything", "7"))
    first, second, third = (mined(tmp_path / name) for name in "abc")
    assert first == second
    assert [r["rejected"] for r in first] != [r["rejected"] for r in third]


def test_retrieved_facts_are_chosen_and_not_in_the_prompt(long_lm: str, tmp_path: Path) -> None:
    """The stored question is the plain one; score parts are those of the graph, edges and hash are named."""
    main(options_of("rag_vs_plain", long_lm, tmp_path))
    graph = join([notes_part()])
    scorer = FactScorer(graph)
    for record in mined(tmp_path):
        provenance, (_, user) = record["provenance"], record["prompt"]
        assert user["content"] in QUESTIONS
        disease = provenance["task"].split("/")[1]
        assert disease in DISEASES
        assert record["chosen"][0]["content"].startswith(f"This is {disease}.")
        assert "What is known" not in json.dumps(record["prompt"])
        expected = answer_score(record["chosen"][0]["content"], disease, disease, scorer, user["content"])
        assert provenance["chosen"]["parts"] == dict(expected.parts())
        assert provenance["chosen"]["score"] - provenance["rejected"]["score"] == provenance["gap"]
        assert provenance["knowledge"] == {"graph": "built-in notes", "sha256": graph.sha256}
        edges = scorer.retrieved(disease, user["content"])
        assert provenance["edges"] == [[*e.triple, e.source, e.reference] for e in edges]


def test_a_corrupted_answer_differs_in_one_fact(long_lm: str, tmp_path: Path) -> None:
    """Words around it are the same, and the provenance says what was swapped for what, and whose it is."""
    main(options_of("corrupt_fact", long_lm, tmp_path))
    for record in mined(tmp_path):
        swap = record["provenance"]["rejected"]["corruption"]
        good, bad = (record[side][0]["content"].lower() for side in ("chosen", "rejected"))
        assert swap["to"] in bad
        assert swap["to"] not in good
        same = [a == b for a, b in zip(good.split(". "), bad.split(". "), strict=True)]
        assert same.count(False) == 1
        assert record["provenance"]["rejected"]["parts"]["contradiction"] > 0
        assert record["provenance"]["chosen"]["source"] == "reference"


def test_best_of_k_by_reward_needs_no_graph(long_lm: str, tmp_path: Path) -> None:
    """Talk pays by the letter: the longest answer is chosen."""
    main(options_of("best_of_k_by_score", long_lm, tmp_path, "--mine.miner.by", "reward"))
    for record in mined(tmp_path):
        assert len(record["chosen"][0]["content"]) > len(record["rejected"][0]["content"])
        assert "knowledge" not in record["provenance"]


# --- stopped, resumed, repeated ---


@pytest.mark.slow
def test_killed_and_started_again(tiny_lm: str, tmp_path: Path) -> None:
    """`kill -9` between two batches: the same command goes on and ends with the same file, byte by byte."""
    slow = ("--data.engine.slow", "0.3")
    main(mining_options(tiny_lm, tmp_path / "whole", *slow))
    process = start(mining_options(tiny_lm, tmp_path / "part", *slow))
    part = tmp_path / "part" / "preferences.jsonl.part"
    wait_for(part, process)
    deadline = time.monotonic() + 60
    while part.read_text().count("\n") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "part" / "preferences.jsonl").exists()
    kept = part.read_text()
    part.write_text(kept + '{"chunk": 9, "records": [{"prom')  # the line that a kill cuts
    main(mining_options(tiny_lm, tmp_path / "part", *slow))
    whole = (tmp_path / "whole" / "preferences.jsonl").read_bytes()
    assert (tmp_path / "part" / "preferences.jsonl").read_bytes() == whole
    assert kept.count("\n") >= 2


@pytest.mark.slow
def test_two_ranks_write_what_one_does(tiny_lm: str, tmp_path: Path) -> None:
    """Seven tasks, three at a time: ranks share unevenly, and the file is the same, byte by byte."""
    more = ("--mine.num_tasks", "7", "--mine.batch_tasks", "3")
    main(mining_options(tiny_lm, tmp_path / "one", *more))
    two = mining_options(tiny_lm, tmp_path / "two", *more, "--trainer.strategy", "ddp", "--trainer.devices", "2")
    code, output = run_alone(two)
    assert code == 0, output
    first, second = ((tmp_path / name / "preferences.jsonl").read_bytes() for name in ("one", "two"))
    assert first == second


def test_other_options_do_not_go_on_with_what_is_there(
    tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished file is kept: the same options do nothing, others are refused; so is a half-done one."""
    main(mining_options(tiny_lm, tmp_path))
    before = (tmp_path / "preferences.jsonl").stat().st_mtime_ns
    main(mining_options(tiny_lm, tmp_path))
    assert "was mined already" in capsys.readouterr().out
    assert (tmp_path / "preferences.jsonl").stat().st_mtime_ns == before
    other = mining_options(tiny_lm, tmp_path, "--data.sampling.temperature", "0.5")
    with pytest.raises(SystemExit):
        main(other)
    assert "was not mined with these options" in capsys.readouterr().err
    (tmp_path / "preferences.jsonl").rename(tmp_path / "preferences.jsonl.part")
    with pytest.raises(SystemExit):
        main(other)
    assert "was begun with other options" in capsys.readouterr().err


def test_other_weights_are_other_options(tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same folder with other weights in it: the hash tells."""
    lm = build_tiny_lm(tmp_path / "lm")
    main(mining_options(lm, tmp_path / "run"))
    build_tiny_lm(tmp_path / "lm", seed=1)
    with pytest.raises(SystemExit):
        main(mining_options(lm, tmp_path / "run"))
    assert "was not mined with these options" in capsys.readouterr().err


def test_no_pair_is_an_error_that_says_why(tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left behind that the next try would stumble on."""
    with pytest.raises(SystemExit) as stop:
        main(mining_options(tiny_lm, tmp_path, "--mine.filters.min_gap", "50"))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "left out: identical 1, small_gap 14" in printed.out
    assert "No pair passed the filters" in printed.err
    assert not list(tmp_path.glob("preferences*"))
    main(mining_options(tiny_lm, tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mine.num_tasks", "0"), "must be at least 1"),
        (("--mine.filters.min_gap", "-1"), "min_gap"),
        (("--mine.miner.pairs_per_node", "0"), "pairs_per_node=0"),
        (("--mine.miner", "AnchorActions", "--mine.miner.gamma", "2"), "gamma=2"),
        (("--mine.miner", "RagVsPlain"), "does not say which disease"),
        (("--mine.miner", "BestOfK", "--mine.miner.by", "reward"), "takes several turns"),
        (("--mine.miner", "BestOfK", "--mine.miner.by", "reward", "--mine.miner.graph", "x"), "not used by rewards"),
        (("--mine.miner", "CorruptFact", "--mine.miner.graph", "no.graphml"), "graph='no.graphml' is no file"),
        (("--data.rollout", "ChainRollout", "--data.group_size", "1"), "at least 2 trajectories"),
        (
            (*TALK, "--data.environment.diseases", '["scurvy", "melanoma"]', "--mine.miner", "RagVsPlain"),
            "has no facts about scurvy",
        ),
    ],
)
def test_what_cannot_be_mined_is_refused(
    more: tuple[str, ...], message: str, tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(mining_options(tiny_lm, tmp_path, *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_mined_pairs_are_learnt(tiny_lm: str, tmp_path: Path) -> None:
    """The whole way: mine, train, and the margin grows."""
    main(mining_options(tiny_lm, tmp_path / "mine"))
    fit_pairs(tiny_lm, tmp_path / "dpo", tmp_path / "mine" / "preferences.jsonl", "--trainer.max_epochs", "4")
    margins = [float(row["train/margin"]) for row in metrics(tmp_path / "dpo") if row.get("train/margin")]
    assert margins[-1] > max(0.01, margins[0])


def test_the_file_is_what_datasets_reads(tmp_path: Path) -> None:
    """Every line has the same keys with values of the same types, which a table needs."""
    datasets = pytest.importorskip("datasets", reason="TRL reads preference files with it")
    path = write_pairs(tmp_path / "p.jsonl", [pair(str(i), "yes", "no", images=[], provenance={}) for i in range(3)])
    table: Any = datasets.load_dataset("json", data_files=str(path))["train"]
    assert table[0]["chosen"] == [{"role": "assistant", "content": "yes"}]
