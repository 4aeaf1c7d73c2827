import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import Evaluation, IterationCheckpoint, read_evaluations
from lit_agentrl.envs import EchoSuite
from lit_agentrl.errors import UserError
from lit_agentrl.intervals import wilson_interval
from lit_agentrl.types import SamplingParams


class Stop(Callback):
    """Dies in the middle of iteration `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.at:
            raise RuntimeError("killed")


class Seen(Callback):
    """What a later callback reads at the end of each iteration."""

    def __init__(self):
        self.success = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.success.append(float(trainer.callback_metrics.get("eval/success", -1)))


def test_evaluates_before_the_first_update_on_schedule_and_at_the_end(tmp_path, capsys):
    events = []
    evaluation = Evaluation(num_tasks=10, every_n_epochs=2)
    seen = Seen()
    trainer(tmp_path, evaluation, seen, max_epochs=3).fit(FakeModule(log=events), datamodule=FakeRollouts(log=events))
    assert events == [
        "collect 0", "evaluate", "update", "update",
        "collect 1", "update", "update", "evaluate",
        "collect 2", "update", "update", "evaluate",
    ]  # fmt: skip
    assert [(r["when"], r["epoch"], r["step"]) for r in evaluation.results] == [
        ("start", 0, 0),
        ("schedule", 2, 4),
        ("end", 3, 6),
    ]
    assert seen.success == pytest.approx([0.3] * 3)
    low, high = wilson_interval(3, 10)
    line = f"held-out success 30.0 % [{100 * low:.1f}, {100 * high:.1f}] (10 tasks, greedy)"
    assert capsys.readouterr().out.splitlines() == [line] * 3


def test_a_policy_is_not_evaluated_twice_at_the_end(tmp_path):
    data = FakeRollouts()
    trainer(tmp_path, Evaluation(every_n_epochs=1, at_start=False)).fit(FakeModule(), datamodule=data)
    assert data.log.count("evaluate") == 2


def test_training_is_the_same_with_and_without_evaluation(tmp_path):
    weights = []
    for callbacks in ([], [Evaluation(every_n_epochs=1)]):
        torch.manual_seed(3)
        module = FakeModule()
        trainer(tmp_path, *callbacks).fit(module, datamodule=FakeRollouts())
        weights.append(torch.stack(module.weights))
    assert torch.equal(*weights)


def test_each_evaluation_is_written_and_its_episodes_too(tmp_path):
    evaluation = Evaluation(num_tasks=4, name="held_out")
    trainer(tmp_path, evaluation).fit(FakeModule(), datamodule=FakeRollouts())
    assert read_evaluations(tmp_path) == evaluation.results
    assert [record["metrics"]["success"] for record in evaluation.results] == [0.75, 0.75]
    files = sorted(path.name for path in (tmp_path / "transcripts").iterdir())
    assert files == ["held_out_000000.jsonl", "held_out_000002.jsonl"]
    lines = (tmp_path / "transcripts" / files[0]).read_text().splitlines()
    assert [json.loads(line)["prompt_id"] for line in lines] == ["test-0", "test-1", "test-2", "test-3"]


def test_loggers_get_the_number_of_updates_as_step(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, Evaluation(), logger=logger).fit(FakeModule(), datamodule=FakeRollouts())
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    success, step = header.index("eval/success"), header.index("step")
    assert [(row[step], float(row[success])) for row in rows if row[success]] == [("0", 0.3), ("4", 0.3)]


def test_resume_neither_repeats_the_start_nor_forgets_it(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, Evaluation(), IterationCheckpoint(), Stop(1), max_epochs=3, enable_checkpointing=True).fit(
            FakeModule(), datamodule=FakeRollouts()
        )
    evaluation, data = Evaluation(), FakeRollouts()
    resumed = trainer(tmp_path, evaluation, IterationCheckpoint(), max_epochs=3, enable_checkpointing=True)
    resumed.fit(FakeModule(), datamodule=data, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert data.log.count("evaluate") == 1
    assert [(r["when"], r["epoch"]) for r in evaluation.results] == [("start", 0), ("end", 3)]
    assert read_evaluations(tmp_path) == evaluation.results


def test_a_run_killed_before_its_last_evaluation_gets_it_when_resumed(tmp_path):
    fit = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(tmp_path, Evaluation(at_end=False), IterationCheckpoint(), **fit).fit(
        FakeModule(), datamodule=FakeRollouts()
    )
    evaluation = Evaluation()
    trainer(tmp_path, evaluation, IterationCheckpoint(), **fit).fit(
        FakeModule(), datamodule=FakeRollouts(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert [(r["when"], r["epoch"], r["step"]) for r in evaluation.results] == [("start", 0, 0), ("end", 2, 4)]


def test_no_evaluation_after_an_exception(tmp_path):
    data = FakeRollouts()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, Evaluation(at_start=False), Stop(1)).fit(FakeModule(), datamodule=data)
    assert "evaluate" not in data.log


@pytest.mark.parametrize("command", ["test", "validate"])
def test_evaluates_without_training(tmp_path, command, capsys):
    data = FakeRollouts()
    evaluation = Evaluation(split="val", num_tasks=6, group_size=4, sampling=SamplingParams(temperature=0.7))
    (metrics,) = getattr(trainer(tmp_path, evaluation), command)(FakeModule(), datamodule=data, verbose=False)
    assert metrics["eval/success"] == metrics["eval/avg_at_4"] == metrics["eval/pass_at_4"] == 0.5
    assert data.evaluations == [("val", 6, 4, SamplingParams(temperature=0.7))]
    assert (tmp_path / "transcripts" / f"eval_{command}.jsonl").exists()
    assert "validation success 50.0 %" in (out := capsys.readouterr().out)
    assert "(6 tasks, 4 episodes each, temperature 0.7, pass@4 50.0 %)" in out


def test_of_repeated_evaluations_the_last_is_read_and_cut_lines_are_left_out(tmp_path):
    record = {"name": "eval", "split": "test", "when": "start", "step": 0, "seconds": 1.0}
    lines = [json.dumps(record), json.dumps(record | {"step": 4}), json.dumps(record | {"seconds": 2.0})]
    (tmp_path / "evaluation.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    assert [(r["step"], r["seconds"]) for r in read_evaluations(tmp_path)] == [(4, 1.0), (0, 2.0)]
    assert read_evaluations(tmp_path / "missing") == []


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path):
    (tmp_path / "evaluation.jsonl").write_text('{"name": "ev')
    trainer(tmp_path, Evaluation(at_start=False)).fit(FakeModule(), datamodule=FakeRollouts())
    assert [r["when"] for r in read_evaluations(tmp_path)] == ["end"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 4}, "temperature 0 plays the same episode 4 times"),
        ({"group_size": 0}, "group_size=0"),
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
    ],
)
def test_refuses_what_cannot_be_evaluated(arguments, message):
    with pytest.raises(UserError, match=message):
        Evaluation(**arguments)


def test_refuses_a_datamodule_without_rollouts(tmp_path):
    with pytest.raises(UserError, match="The callback Evaluation reads rollouts, but BoringDataModule collects none"):
        trainer(tmp_path, Evaluation()).fit(BoringModel(), datamodule=BoringDataModule())


def test_two_evaluations_keep_their_own_state(tmp_path):
    callbacks = [Evaluation(name="easy", at_end=False), Evaluation(name="hard", at_start=False)]
    trainer(tmp_path, *callbacks, IterationCheckpoint(), max_epochs=1, enable_checkpointing=True).fit(
        FakeModule(), datamodule=FakeRollouts()
    )
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    states = {key: value for key, value in checkpoint["callbacks"].items() if key.startswith("Evaluation")}
    assert [len(state["results"]) for _, state in sorted(states.items())] == [1, 0]


class Judged(EchoSuite):
    """A suite that has something to say of all episodes together."""

    def __init__(self, **numbers):
        self.numbers = numbers

    def summary(self, groups):
        return {"num_groups": float(len(groups)), **self.numbers}


def test_a_suite_sums_up_an_evaluation(tmp_path, capsys):
    data, logger = FakeRollouts(), CSVLogger(tmp_path, name="", version="")
    data.environment = Judged(macro_f1=0.5, macro_f1_low=0.25, macro_f1_high=0.75, nothing=math.nan)
    evaluation = Evaluation(num_tasks=4)
    trainer(tmp_path, evaluation, logger=logger).fit(FakeModule(), datamodule=data)
    for record in (*evaluation.results, *read_evaluations(tmp_path)):
        assert (record["metrics"]["num_groups"], record["metrics"]["macro_f1"]) == (4.0, 0.5)
        assert record["metrics"]["nothing"] is None
    assert "  macro_f1: 50.0 % [25.0, 75.0]" in capsys.readouterr().out.splitlines()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"eval/num_groups", "eval/macro_f1_low"} <= set(header)


def test_a_suite_may_not_measure_what_every_evaluation_does(tmp_path):
    data = FakeRollouts()
    data.environment = Judged(success=1.0)
    with pytest.raises(UserError, match=r"summary gives success, which every evaluation measures"):
        trainer(tmp_path, Evaluation()).fit(FakeModule(), datamodule=data)


def test_kinds_whose_outcome_nobody_knows_have_no_line():
    metrics = {"num_tasks/talk": 0.0, "success/talk": None}
    for kind in ("a", "b"):
        metrics |= {f"num_tasks/{kind}": 2.0, f"success/{kind}": 0.5, f"success_low/{kind}": 0.1}
        metrics[f"success_high/{kind}"] = 0.9
    lines = Evaluation.kinds({"metrics": metrics})
    assert lines == [f"{kind}: 50.0 % [10.0, 90.0] of 2" for kind in ("a", "b")]
