"""Killed, interrupted and resumed runs end exactly where an uninterrupted one does."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import checkpoint, fit, options, run_alone, start

SLOW = ("--data.environment", "runs.SlowSuite", "--trainer.max_epochs", "4", "--data.num_workers", "1")


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Until the file is there; the process must not have ended before."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def same(a: object, b: object) -> bool:
    """Bit by bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, output = run_alone(options(tiny_lm, folder, *SLOW))
    assert code == 0, output
    return folder


@pytest.mark.slow
def test_killed_in_the_middle_of_an_iteration_and_resumed(tiny_lm, tmp_path, uninterrupted):
    """`kill -9` while the third iteration collects: the resumed run has the same weights and optimiser, bit by bit."""
    process = start(options(tiny_lm, tmp_path, *SLOW))
    wait_for(tmp_path / "checkpoints" / "iteration_000001.ckpt", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint(tmp_path)["epoch"] == 1
    code, output = run_alone(options(tiny_lm, tmp_path, *SLOW, "--ckpt_path", "last"))
    assert code == 0, output
    whole, resumed = checkpoint(uninterrupted), checkpoint(tmp_path)
    assert resumed["epoch"] == whole["epoch"] == 3
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["optimizer_states"], resumed["optimizer_states"])
    assert counted(whole["RolloutDataModule"]) == counted(resumed["RolloutDataModule"])
    for name in ("iteration_000002.jsonl", "iteration_000003.jsonl"):
        first, again = (transcripts(folder / "transcripts" / name) for folder in (uninterrupted, tmp_path))
        assert first == again


def counted(state: dict[str, Any]) -> list[object]:
    """The datamodule's state without its seconds, which no two runs share."""
    return [state["position"], [count for name, count in state["totals"].items() if not name.endswith("seconds")]]


def transcripts(path: Path) -> list[object]:
    """What was said and earned, without the seconds it took."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        [(r["prompt_id"], r["total_reward"], [(s["action"], s["mean_logprob"]) for s in r["steps"]])] for r in records
    ]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_at_once_and_says_how_to_resume(tiny_lm, tmp_path, sent, code):
    process = start(options(tiny_lm, tmp_path, *SLOW))
    wait_for(tmp_path / "checkpoints" / "iteration_000000.ckpt", process)
    time.sleep(0.3)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert "--ckpt_path" in output
    assert checkpoint(tmp_path)["epoch"] >= 0


def test_resume_in_process_equals_uninterrupted(tiny_lm, tmp_path):
    """With several updates, a synced reference and recomputed old log-probabilities: all of it is in the checkpoint."""
    more = (
        "--data.num_updates=2",
        "--model.old_logprobs=recompute",
        "--model.kl_coef=0.1",
        '--model.reference={"mode": "sync", "sync_every": 3}',
    )
    whole = fit(tiny_lm, tmp_path / "whole", *more, "--trainer.max_epochs=3")
    fit(tiny_lm, tmp_path / "part", *more, "--trainer.max_epochs=1")
    resumed = fit(tiny_lm, tmp_path / "part", *more, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["reference"], resumed["reference"])
