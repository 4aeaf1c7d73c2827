"""Rollouts collected one iteration ahead: whose they are, that none is lost, and how a run with them ends."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from lit_agentrl.envs import EchoSuite
from lit_agentrl.types import Environment
from runs import checkpoint, fit, main, metrics, options, run_alone, start

OWN = ("--data.engine", '{"class_path": "HFEngine", "init_args": {"own_weights": true}}')
AHEAD = (*OWN, "--data.staleness", "1")
FEW = ("--evaluation.num_tasks", "1", "--evaluation.at_start", "false", "--evaluation.at_end", "false")


def said(run: Path, iteration: int) -> list[tuple[str, list[str]]]:
    """What this iteration's trajectories said, all ranks', by prompt."""
    found = []
    for path in sorted((run / "transcripts").glob(f"iteration_{iteration:06d}*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.append((record["prompt_id"], [step["action"] for step in record["steps"]]))
    return sorted(found)


def prompts(run: Path, num_iterations: int) -> list[list[str]]:
    return [sorted({prompt for prompt, _ in said(run, i)}) for i in range(num_iterations)]


def logged(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row.get("reward/mean")]


class Noisy(EchoSuite):
    """Fails when an episode is started for the second iteration."""

    made = 0

    def kind(self, task: str) -> str:
        type(self).made += 1
        if type(self).made > 2:  # two prompts an iteration
            raise ZeroDivisionError("the suite cannot tell")
        return ""


class Dreamy(EchoSuite):
    """A third of a second in front of every episode: a run is nearly always caught collecting."""

    def make(self, task: str) -> Environment:
        time.sleep(0.3)
        return super().make(task)


@pytest.fixture(scope="module")
def ahead(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations, collected ahead."""
    run = tmp_path_factory.mktemp("ahead")
    fit(tiny_lm, run, *AHEAD, *FEW, "--trainer.max_epochs", "4", "--transcripts.show", "0")
    return run


def test_rollouts_are_of_the_policy_before_the_last_update(ahead: Path, tiny_lm: str, tmp_path: Path) -> None:
    """The first two iterations are the untrained policy's, so those of a run that never learns; the third is not."""
    fit(tiny_lm, tmp_path, *FEW, "--trainer.max_epochs", "3", "--model.optimizer.lr", "0.0")
    assert [said(ahead, i) == said(tmp_path, i) for i in range(3)] == [True, True, False]
    assert prompts(ahead, 3) == prompts(tmp_path, 3)  # the same tasks in any case


def test_staleness_and_mismatch_are_logged(ahead: Path) -> None:
    rows = logged(ahead)
    assert [float(row["rollout/staleness"]) for row in rows] == [0, 1, 1, 1]
    gaps = [float(row["mismatch/max_logp_gap"]) for row in rows]
    assert gaps[0] < 1e-3 < min(gaps[1:])
    for row in rows:
        assert float(row["train/ratio"]) == pytest.approx(1.0, abs=1e-5)  # old is the trainer's own
        assert float(row["mismatch/kl_k3"]) >= 0
        assert 0 < float(row["mismatch/weight_mean"]) < 2
        assert 0 <= float(row["mismatch/clipped_fraction"]) <= 1
        assert float(row["time/rollouts"]) > 0
    assert float(rows[0]["mismatch/weight_mean"]) == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_collected_that_is_not_trained(ahead: Path) -> None:
    """The checkpoint's cursor is that of trained iterations: 4 of 2 prompts; and what was spent, theirs alone."""
    state = checkpoint(ahead)["RolloutDataModule"]
    assert state["position"] == 8
    assert state["totals"]["generated_tokens"] == sum(float(row["tokens/generated"]) for row in logged(ahead))


def test_a_resumed_run_skips_and_repeats_no_prompt(ahead: Path, tiny_lm: str, tmp_path: Path) -> None:
    """What was collected ahead is not in the checkpoint: it is collected anew, with the weights of the checkpoint."""
    fit(tiny_lm, tmp_path, *AHEAD, *FEW, "--trainer.max_epochs", "2")
    assert checkpoint(tmp_path)["RolloutDataModule"]["position"] == 4
    fit(tiny_lm, tmp_path, *AHEAD, *FEW, "--trainer.max_epochs", "4", "--ckpt_path", "last")
    assert prompts(tmp_path, 4) == prompts(ahead, 4)
    assert checkpoint(tmp_path)["RolloutDataModule"]["position"] == 8
    assert [float(row["rollout/staleness"]) for row in logged(tmp_path)] == [0, 1]
    assert said(tmp_path, 1) == said(ahead, 1)
    assert said(tmp_path, 2) != said(ahead, 2)


def test_an_evaluation_waits_for_the_rollouts_and_leaves_them_alone(ahead: Path, tiny_lm: str, tmp_path: Path) -> None:
    """It syncs the engine with other weights: rollouts of two policies in one iteration would be the result."""
    every = ("--evaluation.num_tasks", "2", "--evaluation.every_n_epochs", "1")
    fit(tiny_lm, tmp_path, *AHEAD, *every, "--trainer.max_epochs", "3")
    assert [said(tmp_path, i) == said(ahead, i) for i in range(3)] == [True, True, True]
    assert len((tmp_path / "evaluation.jsonl").read_text().splitlines()) >= 3


def test_dynamic_sampling_keeps_its_place(tiny_lm: str, tmp_path: Path) -> None:
    """A reward that never tells trajectories apart: two rounds an iteration, 2 x 2 prompts each, none twice."""
    never = ("--data.max_rounds", "2", "--data.rewards", '[{"function": "lit_agentrl.rewards.solved"}]')
    fit(tiny_lm, tmp_path, *AHEAD, *FEW, *never, "--trainer.max_epochs", "3")
    assert checkpoint(tmp_path)["RolloutDataModule"]["position"] == 12
    assert [float(row["rounds"]) for row in logged(tmp_path)] == [2, 2, 2]
    assert [len(said(tmp_path, i)) for i in range(3)] == [16, 16, 16]


def test_several_updates_and_processes(tiny_lm: str, tmp_path: Path) -> None:
    """Environments in worker processes, which a thread calls; the old policy is scored before the first update."""
    more = (
        "--data.num_updates",
        "2",
        "--data.num_passes",
        "2",
        "--data.workers",
        "processes",
        "--data.num_workers",
        "1",
    )
    fit(tiny_lm, tmp_path, *AHEAD, *FEW, *more, "--trainer.max_epochs", "2")
    rows = logged(tmp_path)
    assert [float(row["failed"]) for row in rows] == [0, 0]
    assert float(rows[1]["mismatch/max_logp_gap"]) > 1e-3
    assert float(rows[1]["train/ratio"]) != 1


def test_an_engine_that_shares_the_weights_is_refused(
    tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options(tiny_lm, tmp_path, *FEW, "--data.staleness", "1"))
    assert ended.value.code == 2
    said_ = capsys.readouterr().err
    for way in ("--data.engine.own_weights true", "VLLMEngine", "--data.staleness 0"):
        assert way in said_


def test_other_numbers_are_refused(tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options(tiny_lm, tmp_path, *OWN, "--data.staleness", "2"))
    assert "staleness=2: allowed are 0" in capsys.readouterr().err


def test_an_error_in_the_thread_ends_the_run_where_it_is_needed(
    tiny_lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the iteration that was trained meanwhile was saved, and with the traceback of where it happened."""
    monkeypatch.setattr(Noisy, "made", 0)
    with pytest.raises(ZeroDivisionError, match="cannot tell") as raised:
        main(options(tiny_lm, tmp_path, *AHEAD, *FEW, "--data.environment", "test_async.Noisy"))
    assert "kind" in {entry.name for entry in raised.traceback}
    assert checkpoint(tmp_path)["epoch"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_collects_ahead(tiny_lm: str, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    slow = ("--data.environment", "test_async.Dreamy", "--data.num_workers", "1", "--trainer.max_epochs", "50")
    process = start(options(tiny_lm, tmp_path, *AHEAD, *FEW, *slow))
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "iteration_000000.ckpt").exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert time.monotonic() - began < 30
    assert "--ckpt_path" in output
    assert "dropped: training ended before it" in output


@pytest.mark.slow
def test_two_ranks_train_as_one(tiny_lm: str, tmp_path: Path) -> None:
    """Three prompts over two ranks: they meet between iterations only."""
    more = (*AHEAD, *FEW, "--data.num_prompts", "3", "--trainer.max_epochs", "3")
    one, two = tmp_path / "one", tmp_path / "two"
    for run, ranks in ((one, ()), (two, ("--trainer.strategy", "ddp", "--trainer.devices", "2"))):
        code, output = run_alone(options(tiny_lm, run, *more, *ranks))
        assert code == 0, output
    assert [said(one, i) for i in range(3)] == [said(two, i) for i in range(3)]
    assert [float(row["rollout/staleness"]) for row in logged(two)] == [0, 1, 1]
    assert checkpoint(two)["RolloutDataModule"]["position"] == 9
