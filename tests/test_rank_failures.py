"""One rank's environments or rewards fail: the others go on, or all end with the reason, and none waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_parts import Run, runs  # noqa: F401  # a fixture
from rank_runs import FSDP2
from runs import checkpoint, metrics, options

pytestmark = pytest.mark.slow
DDP = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_a_rank_without_an_episode_goes_on_with_none(tiny_lm, tmp_path, runs, strategy):  # noqa: F811
    """Its failures are counted, and the other rank's rows are trained."""
    more = ("--data.environment", "rank_failures.BrokenSuite", "--evaluation.every_n_epochs", "0")
    run: Run = runs(options(tiny_lm, tmp_path / "run", *strategy, *more))
    code, _ = run.end(within=300)
    assert code == 0, run.output
    rows = [row for row in metrics(tmp_path / "run") if row.get("reward/mean")]
    assert [float(row["failed"]) for row in rows] == [4, 4]  # of 2 prompts x 4 trajectories
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_reward_that_raises_on_one_rank_ends_both(tiny_lm: str, tmp_path: Path, runs) -> None:  # noqa: F811
    more = ("--data.rewards", '[{"function": "rank_failures.reward"}]', "--evaluation.every_n_epochs", "0")
    run: Run = runs(options(tiny_lm, tmp_path / "run", *DDP, *more))
    code, seconds = run.end(within=180)
    assert code != 0
    assert seconds < 180
    assert "[rank1]: ZeroDivisionError" in run.output
    assert "error: rank 1 of this machine" in run.output
    assert "ended with exit code 1; its own message is above" in run.output
