"""The whole chain on tiny models: GRPO++ -> SFT -> pairs -> DPO -> evaluation, as the shipped pipeline file says."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from derm_twin import MORE, STAGES, long_vlm_folder, twin
from lit_agentrl import cli
from lit_agentrl.callbacks import read_evaluations
from lit_agentrl.datamodules.preference_file import read_preferences
from lit_agentrl.knowledge import KnowledgeGraph
from lit_agentrl.pipeline import lineage
from lit_agentrl.pipeline.hashing import content_hash
from lit_agentrl.pipeline.stage import Stage
from runs import ROOT, metrics
from test_pipeline_kill import is_running, kill, start, until  # noqa: F401  # `start` is a fixture
from vlm_folders import TRAINABLE

FAST = "qwen2_5_vl"
OTHERS = [name for name in TRAINABLE if name != FAST]


@dataclass
class Chain:
    """A pipeline that ran to its end."""

    path: Path
    base: str
    ran: list[str]
    """The stages that ran, in order."""

    @property
    def root(self) -> Path:
        return self.path.with_suffix("")

    def pairs(self, stage: str) -> list[dict[str, Any]]:
        lines = (self.root / stage / "preferences.jsonl").read_text().split("\n")
        return [json.loads(line) for line in lines if line]

    def first(self, stage: str, name: str) -> float:
        """What was logged first."""
        return next(float(row[name]) for row in metrics(self.root / stage) if row.get(name))


def run_in_process(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The pipeline with its stages in this process, which has everything imported; gives those that ran."""
    ran: list[str] = []

    def run_one(stage: Stage, place: str, keep_open: object = ()) -> None:
        ran.append(stage.name)
        cli.main(stage.arguments())

    with monkeypatch.context() as patched:
        patched.setattr("lit_agentrl.pipeline.run.run_one", run_one)
        cli.main(["pipeline", str(path), *words])
    return ran


@pytest.fixture(
    scope="module", params=[FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in TRAINABLE if n != FAST)]
)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain of a family, and mDPO on pairs of answers with and without facts beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    base = long_vlm_folder(folder / "vlm", request.param)
    path = twin(folder, base, more=("mine_rag", "mdpo"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Chain(path, base, run_in_process(path, monkeypatch))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_stage_ran_once_and_none_runs_again(chain, monkeypatch, capfd):
    assert chain.ran == [*STAGES, "mine_rag", "mdpo"]
    assert run_in_process(chain.path, monkeypatch) == []
    assert capfd.readouterr().out.count("finished already") == len(STAGES) + 2


def test_each_stage_s_export_feeds_the_next(chain):
    """By lineage, and by content: what a stage trained is what the next began with."""
    links = lineage(chain.root, "mdpo")
    makers = {link.maker["stage"] for link in links if link.maker is not None}
    assert makers == {"mdpo", "mine_rag", "sft", "grpopp", "graph"}
    assert str(chain.base) in {link.path for link in links if link.maker is None}
    assert {link.condition() for link in links} == {""}
    made = json.loads((chain.root / "lineage.json").read_text())["stages"]
    hashes = {name: content_hash(chain.root / name / "export") for name in ("grpopp", "sft", "dpo", "mdpo")}
    read = {name: {item["sha256"] for item in made[name]["inputs"]} for name in made}
    assert content_hash(chain.base) in read["grpopp"]
    assert hashes["grpopp"] in read["sft"]
    for name in ("sft_panel", "mine", "mine_rag", "dpo", "mdpo"):
        assert hashes["sft"] in read[name]
    assert hashes["dpo"] in read["dpo_panel"]
    assert len({*hashes.values(), content_hash(chain.base)}) == 5


def test_the_language_model_learns_and_what_sees_is_as_it_was(chain):
    before, after = weights(Path(chain.base)), weights(chain.root / "mdpo" / "export")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    seeing = {name for name in before if any(part in name for part in ("vis", "connector", "multi_modal_projector"))}
    assert seeing
    assert not changed & seeing


def test_the_panel_is_the_same_after_every_stage(chain):
    """Both kinds of tasks, measured by their own numbers; the report has a row a stage and nothing to object."""
    records = [*read_evaluations(chain.root / "grpopp"), *read_evaluations(chain.root / "sft_panel")]
    records += read_evaluations(chain.root / "dpo_panel")
    assert len(records) == 4
    for record in records:
        found = record["metrics"]
        assert (found["num_recognised"], found["num_answered"], found["failed"]) == (7.0, 3.0, 0.0)
        assert 0 <= found["accuracy"] <= 1
        assert {"macro_f1", "support", "contradiction", "coverage", "reference_f1", "recall/melanoma"} <= found.keys()
    table = json.loads((chain.root / "report.json").read_text())["table"]
    assert [row["label"] for row in table["rows"]] == ["base", "GRPO++", "+ SFT", "+ DPO"]
    assert table["notes"] == []


def test_correct_traces_of_the_first_stage_are_mixed_into_the_second(chain):
    lines = [line for file in (chain.root / "grpopp" / "transcripts").glob("iteration_*") for line in file.open()]
    played = [json.loads(line) for line in lines]
    assert len(played) == 2 * 4 * 6
    solved = {record["prompt_id"] for record in played if record["success"]}
    assert solved
    assert all(step["images"] for record in played for step in record["steps"])
    assert chain.first("sft", "conversations") == 7 + 1  # seven talks, and of the traces 15 % of the whole


def test_pairs_show_images_and_say_where_they_are_from(chain):
    """Files beside the pairs by content, the graph by its hash; the same format for every miner."""
    graph = KnowledgeGraph.load(str(chain.root / "graph" / "derm.graphml"))
    for stage, mode in (("mine", "corrupt_fact"), ("mine_rag", "rag_vs_plain")):
        pairs = chain.pairs(stage)
        assert len(pairs) >= 4
        for pair in pairs:
            assert [message["role"] for message in pair["prompt"]] == ["system", "user"]
            (image,) = pair["images"]
            assert hashlib.sha256((chain.root / stage / image["path"]).read_bytes()).hexdigest() == image["sha256"]
            origin = pair["provenance"]
            assert origin["mode"] == mode
            assert origin["knowledge"]["sha256"] == graph.sha256
            assert str(chain.root / "sft" / "export") in json.dumps(origin["policy"])
        read = read_preferences(chain.root / stage / "preferences.jsonl")
        assert [len(preference.images) for preference in read] == [1] * len(pairs)


def test_a_corrupted_answer_differs_in_one_fact(chain):
    for pair in chain.pairs("mine"):
        good, bad = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        corruption = pair["provenance"]["rejected"]["corruption"]
        assert good != bad
        assert pair["provenance"]["chosen"]["source"] == "reference"
        assert pair["provenance"]["chosen"]["score"] > pair["provenance"]["rejected"]["score"]
        assert corruption


def test_answers_with_facts_are_stored_under_the_plain_question(chain):
    for pair in chain.pairs("mine_rag"):
        facts = [edge[2] for edge in pair["provenance"]["edges"]]
        assert facts
        asked = pair["prompt"][-1]["content"]
        assert not any(fact in asked for fact in facts)


def test_preference_training_starts_at_its_reference(chain):
    """All pairs are one step: the first loss is that of equal policies, log 2 for a term on answers or on images."""
    for stage, source in (("dpo", "mine"), ("mdpo", "mine_rag")):
        number = len(chain.pairs(source))
        assert number <= 9
        assert chain.first(stage, "pairs") == chain.first(stage, "with_images") == number
    assert chain.first("dpo", "train/loss_sigmoid") == pytest.approx(math.log(2), abs=1e-5)
    for name in ("sigmoid", "image", "anchor"):
        assert chain.first("mdpo", f"train/loss_{name}") == pytest.approx(math.log(2), abs=1e-4)
    assert chain.first("mdpo", "train/margin") == pytest.approx(0, abs=1e-4)


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Stages in processes of their own run this copy and find the tests' classes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


@pytest.mark.slow
@pytest.mark.parametrize("chain", [FAST], indirect=True)
def test_killed_while_it_mines(chain, start, monkeypatch):  # noqa: F811
    """`kill -9` after the first batch of tasks: the stage goes on with the second, and the pairs are the same."""
    folder = chain.root / "mine"
    before, trained = (folder / "preferences.jsonl").read_bytes(), content_hash(chain.root / "dpo" / "export")
    process = start(str(chain.path), "--rerun", "mine")
    part = folder / "preferences.jsonl.part"
    until(lambda: part.is_file() and '"chunk"' in part.read_text(), process)
    kill(process)
    assert is_running(chain.root, "mine")
    assert 1 <= part.read_text().count('"chunk"') < 3
    assert run_in_process(chain.path, monkeypatch) == ["mine"]  # what was trained on the pairs is not stale
    assert (folder / "preferences.jsonl").read_bytes() == before
    assert content_hash(chain.root / "dpo" / "export") == trained


@pytest.mark.slow
@pytest.mark.parametrize("chain", [FAST], indirect=True)
def test_killed_in_every_stage(chain, start, capfd):  # noqa: F811
    """In real processes, one kill a stage: every export and every score as in the run without."""
    path = twin(chain.path.parent, chain.base, more=("mine_rag", "mdpo"), root="killed")
    root = path.with_suffix("")
    moments = {
        **{
            name: lambda name=name: (root / name / "checkpoints" / "iteration_000000.ckpt").exists()
            for name in ("grpopp", "sft", "dpo", "mdpo")
        },
        **{name: lambda name=name: is_running(root, name) for name in ("sft_panel", "mine", "dpo_panel", "mine_rag")},
    }
    for name in ("grpopp", "sft", "sft_panel", "mine", "dpo", "dpo_panel", "mine_rag", "mdpo"):
        process = start(str(path))
        until(moments[name], process)
        kill(process)
        assert is_running(root, name), "it had ended before the kill: nothing is tested"
    capfd.readouterr()
    cli.main(["pipeline", str(path)])
    assert capfd.readouterr().out.count("finished already") == len(STAGES) + 1
    for name in ("grpopp", "sft", "dpo", "mdpo"):
        assert content_hash(root / name / "export") == content_hash(chain.root / name / "export")
    for name in ("grpopp", "sft_panel", "dpo_panel"):
        found, whole = (read_evaluations(where / name)[-1]["metrics"] for where in (root, chain.root))
        assert found == whole
    for name in ("mine", "mine_rag"):
        assert answers(Chain(path, chain.base, []), name) == answers(chain, name)


def answers(made: Chain, stage: str) -> list[dict[str, Any]]:
    """Pairs without where they are from, which names folders."""
    return [{key: value for key, value in pair.items() if key != "provenance"} for pair in made.pairs(stage)]


@pytest.mark.slow
@pytest.mark.parametrize("chain", [FAST], indirect=True)
def test_the_best_of_several_answers(chain, monkeypatch):
    """Another miner on the same chain: by reward, two pairs a question."""
    path = twin(chain.path.parent, chain.base, more=tuple(MORE))
    assert run_in_process(path, monkeypatch) == ["mine_best"]
    pairs = chain.pairs("mine_best")
    assert len(pairs) == 2 * 9
    assert all(pair["provenance"]["gap"] > 0 for pair in pairs)
