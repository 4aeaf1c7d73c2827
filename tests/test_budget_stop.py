"""What a run spends is counted once, survives a resume, and ends the run at its cap."""

import json

import pytest
from torch.utils.data import DataLoader

from callback_parts import Batches, FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import BudgetStop, Evaluation, IterationCheckpoint, UpdateClock, read_evaluations
from lit_agentrl.callbacks.budget_stop import PATIENCE
from lit_agentrl.datamodules.statistics import budget_metrics, iteration_cost
from lit_agentrl.errors import UserError
from lit_agentrl.types import Ledger, Trajectory, TrajectoryGroup
from runs import COUNTED, checkpoint, fit, metrics

MANY = ("--trainer.max_epochs", "50")


class Spending(FakeRollouts):
    """Every collection costs 100 generated tokens, 3 tool calls and 10 seconds."""

    def __init__(self):
        super().__init__()
        self.totals, self.total_seconds = Ledger(), 0.0

    def train_dataloader(self):
        if self.trainer.fit_loop.epoch_progress.current.processed >= self.trainer.max_epochs:
            return DataLoader(Batches([]), batch_size=None)  # as the real one: a finished run collects no more
        before = self.collected
        loader = super().train_dataloader()
        if self.collected != before:
            self.totals += Ledger(generated_tokens=100, tool_calls=3)
            self.total_seconds += 10.0
        return loader

    def state_dict(self):
        return {"tokens": self.totals.generated_tokens, "seconds": self.total_seconds}

    def load_state_dict(self, state_dict):
        self.totals, self.total_seconds = Ledger(generated_tokens=state_dict["tokens"]), state_dict["seconds"]


def spend(run, *callbacks, ckpt_path=None, max_epochs=9, data=None):
    data = data or Spending()
    loop = trainer(
        run, UpdateClock(), *callbacks, IterationCheckpoint(), max_epochs=max_epochs, enable_checkpointing=True
    )
    loop.fit(FakeModule(), datamodule=data, ckpt_path=ckpt_path)
    return data


@pytest.mark.parametrize(
    ("caps", "iterations"),
    [
        ({"generated_tokens": 300}, 3),
        ({"generated_tokens": 301}, 4),
        ({"tool_calls": 7}, 3),
        ({"seconds": 25.0}, 3),
        ({"generated_tokens": 500, "tool_calls": 6}, 2),
        ({}, 5),
    ],
)
def test_the_run_ends_after_the_iteration_that_reaches_a_cap(tmp_path, caps, iterations, capsys):
    data = spend(tmp_path, Evaluation(num_tasks=2), BudgetStop(**caps), max_epochs=5)
    assert data.totals.generated_tokens == 100 * iterations
    assert [r["epoch"] for r in read_evaluations(tmp_path)] == [0, iterations]  # the end is a normal one
    assert (tmp_path / "checkpoints" / f"iteration_{iterations - 1:06d}.ckpt").is_file()
    assert ("training ends: " in capsys.readouterr().out) == bool(caps)


def test_evaluations_say_what_was_spent_when(tmp_path):
    """Nothing at the start, though the first collection is done by then: the policy has not learnt from it."""
    spend(tmp_path, Evaluation(num_tasks=2, every_n_epochs=2), max_epochs=3)
    records = read_evaluations(tmp_path)
    assert [r["budget"]["generated_tokens"] for r in records] == [0, 200, 300]
    assert [r["budget"]["tool_calls"] for r in records] == [0, 6, 9]
    seconds = [r["budget"]["seconds"] for r in records]
    assert seconds[0] == 0
    assert 20 < seconds[1] < 25  # 10 a collection, and the updates of a linear layer
    assert 30 < seconds[2] < 35


def test_no_iteration_is_started_when_the_budget_is_spent(tmp_path, capsys):
    """As after a kill between the last checkpoint and the last evaluation."""
    spend(tmp_path, max_epochs=3)
    data = spend(
        tmp_path,
        Evaluation(num_tasks=2),
        BudgetStop(generated_tokens=250),
        ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
    )
    assert data.totals.generated_tokens == 300
    assert [r["when"] for r in read_evaluations(tmp_path)] == ["end"]
    assert "300 generated tokens spent, the budget is 250" in capsys.readouterr().out


def test_a_cap_that_nobody_counts_is_no_endless_run(tmp_path):
    class Toolless(Spending):
        def train_dataloader(self):
            loader = super().train_dataloader()
            self.totals.tool_calls = 0
            return loader

    with pytest.raises(UserError, match="counted no tool calls"):
        spend(tmp_path, BudgetStop(tool_calls=5), max_epochs=PATIENCE + 1, data=Toolless())


def test_refuses_what_cannot_be_counted(tmp_path):
    with pytest.raises(UserError, match="FakeRollouts keeps no ledger"):
        trainer(tmp_path, BudgetStop(generated_tokens=5)).fit(FakeModule(), datamodule=FakeRollouts())
    with pytest.raises(UserError, match="needs the callback UpdateClock"):
        trainer(tmp_path, BudgetStop(seconds=5)).fit(FakeModule(), datamodule=Spending())
    for value in (0, -1, float("nan")):
        with pytest.raises(UserError, match="above 0"):
            BudgetStop(seconds=value)


def test_costs_of_what_was_dropped_count_too():
    """Hand-made ledgers: trajectories 5 + 7 tokens, 2 dropped; a second group of 1."""
    first = TrajectoryGroup(
        "a",
        [Trajectory([], cost=Ledger(5, tool_calls=1, env_seconds=0.5)), Trajectory([], cost=Ledger(7))],
        dropped_cost=Ledger(2, replayed_steps=4),
    )
    cost = iteration_cost([first, TrajectoryGroup("b", [Trajectory([], cost=Ledger(1, env_seconds=0.25))])])
    assert cost == Ledger(generated_tokens=15, tool_calls=1, replayed_steps=4, env_seconds=0.75)
    named = budget_metrics(cost, cost + cost)
    assert named["budget/generated_tokens"] == 15
    assert named["budget/total_replayed_steps"] == 8
    assert iteration_cost([]) == Ledger()


def test_a_real_run_counts_its_tokens_and_a_resumed_one_goes_on(tiny_lm, tmp_path):
    """The total is the sum over the transcripts of all iterations, whether resumed or not, and so is the log's."""
    whole = fit(tiny_lm, tmp_path / "whole", *COUNTED, "--trainer.max_epochs=4")["RolloutDataModule"]
    fit(tiny_lm, tmp_path / "part", *COUNTED, "--trainer.max_epochs=2")
    first_seconds = checkpoint(tmp_path / "part")["RolloutDataModule"]["total_seconds"]
    resumed = fit(tiny_lm, tmp_path / "part", *COUNTED, "--trainer.max_epochs=4", "--ckpt_path=last")
    resumed = resumed["RolloutDataModule"]
    said = [
        step["action_tokens"]
        for path in (tmp_path / "part" / "transcripts").glob("iteration_*.jsonl")
        for line in path.read_text().splitlines()
        for step in json.loads(line)["steps"]
    ]
    assert whole["totals"]["generated_tokens"] == resumed["totals"]["generated_tokens"] == sum(said) > 0
    assert resumed["total_seconds"] > first_seconds > 0
    last = [row for row in metrics(tmp_path / "part") if row.get("budget/total_generated_tokens")][-1]
    assert float(last["budget/total_generated_tokens"]) == sum(said)
    assert float(last["budget/total_seconds"]) == pytest.approx(resumed["total_seconds"], rel=1e-5)
    assert 0 < float(last["budget/generated_tokens"]) < sum(said)


def test_a_real_run_ends_at_its_cap(tiny_lm, tmp_path, capsys):
    state = fit(tiny_lm, tmp_path, *COUNTED, *MANY, "--budget.tool_calls=20")
    calls = state["RolloutDataModule"]["totals"]["tool_calls"]
    assert calls >= 20
    assert state["epoch"] < 10
    evaluations = read_evaluations(tmp_path)
    assert [e["budget"]["tool_calls"] for e in evaluations] == [0, calls]
    assert (tmp_path / "export" / "model.safetensors").is_file()
    capsys.readouterr()
    again = fit(tiny_lm, tmp_path, *COUNTED, *MANY, "--budget.tool_calls=20", "--ckpt_path=last")
    assert again["RolloutDataModule"]["totals"]["tool_calls"] == calls
    assert f"{calls} tool calls spent" in capsys.readouterr().out
