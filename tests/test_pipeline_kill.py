"""Pipelines as real processes: killed in every stage they end as if nothing had been, and two do not meet."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_letters

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_agentrl.callbacks import read_evaluations
from lit_agentrl.cli import main
from lit_agentrl.pipeline import lineage
from lit_agentrl.pipeline.hashing import content_hash
from lit_agentrl.pipeline.lock import FILE_NAME, only_one
from runs import ECHO, ROOT
from tiny import build_tiny_lm

DEMO = "make-webshop-demo"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Stages in processes of their own run this copy and find the tests' classes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a pipeline in a session of its own; what is left of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-u", "-m", "lit_agentrl", "pipeline", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if group_of(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def group_of(process: "subprocess.Popen[str]") -> bool:
    """Whether any process of its session still lives."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None, seconds: float = 240) -> None:
    """Wait for it; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        if time.monotonic() > deadline:
            if process is not None:
                kill(process)
            raise AssertionError(process.communicate()[0] if process is not None else "it did not come about")
        time.sleep(0.01)


def kill(process: "subprocess.Popen[str]") -> None:
    """The pipeline and its stage, as a machine that goes down would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def slow_demo(folder: Path) -> Path:
    """Two stages of a second or so, the second reading the first."""
    stages = {
        "one": {"command": DEMO, "options": {"num_products": 4000}},
        "two": {"command": DEMO, "options": {"num_products": 4000, "seed": 1}, "inputs": ["${stages.one.export}"]},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"root": str(folder / "runs"), "stages": stages}, sort_keys=False))
    return path


def is_running(root: Path, name: str) -> bool:
    """Whether a stage has begun and not ended, or was killed in between."""
    marker = root / name / "stage.json"
    return marker.is_file() and not json.loads(marker.read_text())["finished"]


def test_killed_in_each_stage_and_run_again(tmp_path, start, capfd):
    """`kill -9` in the first, then in the second; then half an output where the command refuses one."""
    runs = tmp_path / "runs"
    path = slow_demo(tmp_path)
    main(["pipeline", str(path)])
    whole = {name: content_hash(runs / name / "export") for name in ("one", "two")}
    shutil.rmtree(runs)
    for name in ("one", "two"):
        process = start(str(path))
        until(lambda name=name: is_running(runs, name), process)
        time.sleep(0.3)
        kill(process)
        assert is_running(runs, name)
    (runs / "two" / "export").mkdir(exist_ok=True)
    (runs / "two" / "export" / "half.json").write_text("[")
    capfd.readouterr()
    main(["pipeline", str(path)])
    out = capfd.readouterr().out
    assert "[1/2] one: finished already" in out
    assert f"two: {runs}/two/export is now {runs}/two/export.old-1" in out
    assert {name: content_hash(runs / name / "export") for name in ("one", "two")} == whole
    assert [link.condition() for link in lineage(runs)] == ["", ""]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_pipeline_and_stage_and_the_same_command_goes_on(tmp_path, start, sent, code, capfd):
    """SIGTERM reaches the pipeline alone, as from `kill`; SIGINT the whole group, as from a terminal."""
    path = slow_demo(tmp_path)
    process = start(str(path))
    until(lambda: is_running(tmp_path / "runs", "one"), process)
    time.sleep(0.3)
    (os.kill if sent is signal.SIGTERM else os.killpg)(process.pid, sent)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert "Stopped. The same command continues" in output
    assert not group_of(process)
    assert not (tmp_path / "runs" / FILE_NAME).exists()
    main(["pipeline", str(path)])
    assert "finished already" not in capfd.readouterr().out


def test_a_second_pipeline_waits_for_the_first_and_for_a_stage_that_it_left_behind(tmp_path, start, capfd):
    """The lock goes with the last process that holds it, whatever the file says."""
    path, runs = slow_demo(tmp_path), tmp_path / "runs"
    first = start(str(path))
    until(lambda: is_running(runs, "one"), first)
    with pytest.raises(SystemExit):
        main(["pipeline", str(path)])
    text = capfd.readouterr().err
    assert f"another pipeline runs there, process {first.pid} since" in text
    main(["pipeline", str(path), "--dry-run"])  # which only looks
    first.send_signal(signal.SIGKILL)  # the pipeline alone: its stage goes on
    first.wait()
    assert group_of(first)
    with pytest.raises(SystemExit):
        main(["pipeline", str(path)])
    assert "a stage of it still runs" in capfd.readouterr().err
    until(lambda: not group_of(first))
    assert (runs / FILE_NAME).exists()
    main(["pipeline", str(path)])
    assert not (runs / FILE_NAME).exists()


def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    (tmp_path / FILE_NAME).write_text("1 since ever\n")
    with only_one(tmp_path):
        assert str(os.getpid()) in (tmp_path / FILE_NAME).read_text()


def test_a_stage_that_fails_leaves_its_command(tmp_path, capfd):
    """And is run anew by the next call, with what was corrected."""
    path = slow_demo(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "export").write_text("a file of somebody's")
    with pytest.raises(SystemExit) as end:
        main(["pipeline", str(path)])
    assert end.value.code == 2
    text = capfd.readouterr().err
    assert f"stage 'one' failed. Alone: lit-agentrl {DEMO} {tmp_path}/runs/one/export --num_products 4000" in text
    assert (tmp_path / "runs" / "one" / "export").read_text() == "a file of somebody's"


def chain(folder: Path, lm: str) -> Path:
    """A supervised warm-up, three iterations of GRPO that can be killed in, and an evaluation."""
    warm_up = {
        "model": {"class_path": "SFTModule", "init_args": {"optimizer": {
            "class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}}},
        "data": {"class_path": "ConversationDataModule", "init_args": {
            "source": {"class_path": "Walkthroughs", "init_args": {
                "environment": {"class_path": "EchoSuite"}, "num_tasks": 8}},
            "batch_size": 1, "max_length": 256}},
    }  # fmt: skip
    (folder / "warm_up.yaml").write_text(yaml.safe_dump(warm_up))
    small = {"evaluation.num_tasks": 3, "data.num_prompts": 2, "transcripts.show": 0, "trainer.accelerator": "cpu"}
    small |= {"data.environment": "runs.SlowSuite", "data.num_workers": 1}
    learn = {"model.optimizer.lr": 1e-2, "trainer.max_epochs": 3, "data.rewards": [{"function": "runs.mean_token"}]}
    stages = {
        "sft": {
            "command": "fit",
            "config": "warm_up.yaml",
            "options": {"model.pretrained": lm, "trainer": {"max_epochs": 3, "accelerator": "cpu"}},
        },
        "grpo": {
            "command": "fit",
            "config": ECHO,
            "options": {"model.pretrained": "${stages.sft.export}", **small, **learn},
        },
        "score": {
            "command": "evaluate",
            "config": ECHO,
            "options": {"model.pretrained": "${stages.grpo.export}", **small},
        },
    }
    rows = [{"label": "warm", "stage": "grpo", "which": "first"}, "grpo", "score"]
    report = {"table": {"metrics": ["success", "reward/mean"], "stages": rows}, "export": "grpo"}
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"root": "unset", "stages": stages, "report": report}, sort_keys=False))
    return path


def exports(root: Path) -> list[str | None]:
    return [content_hash(root / name / "export") for name in ("sft", "grpo")]


def scores(root: Path) -> list[dict[str, float | None]]:
    return [read_evaluations(root / name)[-1]["metrics"] for name in ("grpo", "score")]


@pytest.mark.slow
def test_supervised_then_grpo_then_an_evaluation_killed_in_each(tiny_lm, tmp_path, start, capfd):
    """The same weights bit by bit, the same scores and the same lineage as without a kill."""
    path, whole, killed = chain(tmp_path, tiny_lm), tmp_path / "whole", tmp_path / "killed"
    main(["pipeline", str(path), f"root={whole}"])
    assert f"Hugging Face folder of the trained policy: {whole}/grpo/export" in capfd.readouterr().out
    table = json.loads((whole / "report.json").read_text())["table"]
    assert [row["label"] for row in table["rows"]] == ["warm", "grpo", "score"]
    assert table["notes"] == []  # the same panel
    assert table["rows"][1]["values"]["success"] == table["rows"][2]["values"]["success"]  # the same policy

    moments = {
        "sft": lambda: (killed / "sft" / "checkpoints" / "last.ckpt").exists(),
        "grpo": lambda: (killed / "grpo" / "checkpoints" / "iteration_000000.ckpt").exists(),
        "score": lambda: is_running(killed, "score"),
    }
    for name, moment in moments.items():
        process = start(str(path), f"root={killed}")
        until(moment, process)
        time.sleep(0.2)
        kill(process)
        assert is_running(killed, name), "it had ended before the kill: nothing is tested"
    capfd.readouterr()
    main(["pipeline", str(path), f"root={killed}"])
    assert capfd.readouterr().out.count("finished already") == 2
    assert exports(killed) == exports(whole) != [None, None]
    assert scores(killed) == scores(whole)
    for root in (whole, killed):
        chain_back = lineage(root)
        assert [link.maker and link.maker["stage"] for link in chain_back] == ["grpo", "sft", None]
        assert chain_back[2].path == tiny_lm
        assert {link.condition() for link in chain_back} == {""}
    made = [json.loads((root / "lineage.json").read_text())["stages"] for root in (whole, killed)]
    assert [[one["attempts"] for one in stages.values()] for stages in made] == [[1, 1, 1], [2, 2, 2]]
    assert made[0]["grpo"]["metrics"]["metrics"] == made[1]["grpo"]["metrics"]["metrics"]
    assert made[0]["grpo"]["seed"] == 0
    assert (killed / "grpo" / "resolved.yaml").read_text().count("SlowSuite") == 1


def write_readable_lm(folder: Path) -> str:
    """A tiny random model that says mostly letters: pairs of answers that are no text are left out."""
    lm = AutoModelForCausalLM.from_pretrained(build_tiny_lm(folder))
    letters = torch.tensor(AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids([*ascii_letters]))
    with torch.no_grad():
        others = torch.ones(len(lm.lm_head.weight), dtype=torch.bool).index_fill(0, letters, False)
        lm.lm_head.weight *= torch.where(others, 0.0, 20.0)[:, None]
    lm.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_trees_then_pairs_then_dpo(tmp_path, capfd):
    """Stages of any kind, in any order: Tree-GRPO, mining, DPO, an evaluation; each reads what the one before left."""
    lm = write_readable_lm(tmp_path / "lm")
    small = {"model.pretrained": lm, "trainer.accelerator": "cpu", "data.num_workers": 1}
    rewards = {"data.rewards": [{"function": "runs.mean_token"}]}
    trees = {"trainer.max_epochs": 1, "data.num_prompts": 2, "evaluation.num_tasks": 2, "transcripts.show": 0}
    experiment = ROOT / "configs" / "experiment"
    stages = {
        "trees": {
            "command": "fit",
            "config": str(experiment / "tree_grpo_echo.yaml"),
            "options": {**small, **rewards, **trees},
        },
        "mine": {
            "command": "mine-preferences",
            "config": str(ROOT / "configs" / "preferences" / "echo.yaml"),
            "options": {
                **small,
                **rewards,
                "model.pretrained": "${stages.trees.export}",
                "mine": {"num_tasks": 12, "filters": {"min_gap": 0.01}},
            },
        },
        "dpo": {
            "command": "fit",
            "config": str(experiment / "dpo_echo.yaml"),
            "options": {
                "model.pretrained": "${stages.trees.export}",
                "data.path": "${stages.mine.export}",
                "trainer": {"max_epochs": 1, "accelerator": "cpu"},
            },
        },
        "score": {
            "command": "evaluate",
            "config": ECHO,
            "options": {**small, "model.pretrained": "${stages.dpo.export}", "evaluation.num_tasks": 2},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"root": str(tmp_path / "runs"), "stages": stages}, sort_keys=False))
    main(["pipeline", str(path)])
    links = [(link.depth, link.maker["stage"] if link.maker else link.path) for link in lineage(tmp_path / "runs")]
    assert links[0] == (0, "dpo")
    assert set(links[1:]) == {(1, "trees"), (1, "mine"), (2, "trees"), (2, lm)}
    assert {link.condition() for link in lineage(tmp_path / "runs")} == {""}
    capfd.readouterr()
    pairs = tmp_path / "runs" / "mine" / "preferences.jsonl"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit):  # a pair is lost: the fit was of other data
        main(["pipeline", str(path)])
    assert "stage 'dpo' is stale: its input" in capfd.readouterr().err
