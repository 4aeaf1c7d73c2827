"""Success on held-out tasks: before training, on schedule, at the end, and without training."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from lit_agentrl.callbacks.metrics import evaluation_metrics, joined
from lit_agentrl.callbacks.records import group_records, write_records
from lit_agentrl.callbacks.source import SpendingSource, SuiteSource, rollout_source
from lit_agentrl.errors import UserError
from lit_agentrl.files import append_line
from lit_agentrl.types import Ledger, SamplingParams, Split, TrajectoryGroup

GREEDY = SamplingParams(temperature=0.0)
FILE_NAME = "evaluation.jsonl"
INTERVAL = ("success", "success_low", "success_high")
SPLIT_TITLES: dict[Split, str] = {"train": "training", "val": "validation", "test": "held-out"}


class EvaluationRecord(TypedDict):
    """One evaluation, as it is kept in `Evaluation.results` and in `<run>/evaluation.jsonl`."""

    name: str
    when: str
    """"start", "schedule", "end", or "test" and "validate" for an evaluation without training."""
    epoch: int
    """Iterations finished when the policy was evaluated: 0 before training."""
    step: int
    """Optimiser steps done."""
    split: Split
    num_tasks: int
    num_episodes: int
    group_size: int
    temperature: float
    seconds: float
    budget: dict[str, float]
    """What training the evaluated policy cost so far: the entries of `Ledger`, and `seconds` of wall clock without
    evaluations. All 0 at the start; empty where the datamodule keeps no ledger."""
    metrics: dict[str, float | None]
    """Without the callback's name in front; None where nothing supports a number."""


class Evaluation(Callback):
    """Rolls the policy out on tasks of a split that training does not touch.

    Logs `<name>/success` with a 95 % interval (`success_low`, `success_high`: Wilson's for one episode a task,
    otherwise a bootstrap over tasks), the same as `success/<kind>` for every kind of task that the environment tells
    apart, `avg_at_k` and `pass_at_k` for groups, `reward/mean` and components, `valid_actions` (the share of actions
    that the environment could use), `environment/<name>` for an environment's own numbers, `length/steps`,
    `length/action_tokens`, `truncated`, `failed` (episodes that the environment broke, left out of all else),
    `num_tasks`, `num_episodes`; and what the suite makes of all episodes together (`EnvironmentSuite.summary`), under
    the names it gives. Each evaluation appends a line to `<run>/evaluation.jsonl`, with what the run had cost
    by then, and writes its transcripts to `<run>/transcripts/<name>_<iterations finished>.jsonl`.

    Training is the same with and without it: random states are put back, and the start is not repeated on resume.

    Args:
        split: Which tasks to evaluate, whichever command asks.
        num_tasks: The first so many tasks of the split; None for all.
        group_size: Episodes per task.
        sampling: How to sample; greedy by default. `max_new_tokens` should be the training's.
        every_n_epochs: Also after every so many iterations; 0 for never.
        at_start: Before the first update.
        at_end: After the last update, if that policy was not just evaluated.
        name: Prefix of the metrics and of the transcript files; instances need different names.

    Example:
        ```yaml
        trainer:
          callbacks:
            - class_path: lit_agentrl.callbacks.Evaluation
              init_args: {split: test, num_tasks: 100, every_n_epochs: 5}
        ```
    """

    def __init__(
        self,
        split: Split = "test",
        num_tasks: int | None = None,
        group_size: int = 1,
        sampling: SamplingParams = GREEDY,
        every_n_epochs: int = 0,
        at_start: bool = True,
        at_end: bool = True,
        name: str = "eval",
    ) -> None:
        if group_size < 1 or every_n_epochs < 0 or (num_tasks is not None and num_tasks < 1):
            raise UserError(
                f"Evaluation(num_tasks={num_tasks}, group_size={group_size}, every_n_epochs={every_n_epochs}): "
                "tasks and episodes per task must be at least 1 (num_tasks=null for all), every_n_epochs at least 0."
            )
        if group_size > 1 and sampling.temperature == 0:
            raise UserError(
                f"Evaluation(group_size={group_size}) with temperature 0 plays the same episode {group_size} times. "
                "Set group_size=1, or a sampling temperature above 0."
            )
        self.split: Split = split
        self.num_tasks = num_tasks
        self.group_size = group_size
        self.sampling = sampling
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.at_end = at_end
        self.name = name
        self.results: list[EvaluationRecord] = []
        self.seconds = 0.0
        """Seconds spent evaluating so far in this process."""
        self._evaluated_step = -1
        self._is_fit_ended = False

    @property
    def state_key(self) -> str:
        """Instances with different names keep different states in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, object]:
        """The results so far, and which policy was evaluated last."""
        return {"results": list(self.results), "evaluated_step": self._evaluated_step}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take over `state_dict`."""
        self.results = state_dict["results"]  # type: ignore[assignment]
        self._evaluated_step = state_dict["evaluated_step"]  # type: ignore[assignment]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """List the tasks before a model is loaded: what is wrong with their files is said now."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
        is_asked = stage != "fit" or self.at_start or self.at_end or self.every_n_epochs > 0
        if is_asked and isinstance(datamodule, SuiteSource) and not datamodule.environment.tasks(self.split):
            raise UserError(f"The {self.split} split has no tasks to evaluate on: check the environment's options.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a datamodule that cannot be evaluated before the first rollout is paid for."""
        rollout_source(trainer, type(self).__name__)
        self._is_fit_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the policy that training starts from.

        Not in `on_fit_start`: there sharded strategies have not restored callbacks yet and logging is refused. The
        first collection is done by now, the first update is not.
        """
        if self.at_start and trainer.ckpt_path is None:
            self._log(pl_module, self._evaluate(trainer, "start", 0))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate on schedule. Checkpoint callbacks run later, so a resumed run does not evaluate twice."""
        num_finished = trainer.current_epoch + 1
        if self.every_n_epochs and num_finished % self.every_n_epochs == 0:
            self._log(pl_module, self._evaluate(trainer, "schedule", num_finished))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the trained policy."""
        self._is_fit_ended = True
        if self.at_end and self._evaluated_step != trainer.global_step:
            self._evaluate(trainer, "end", trainer.current_epoch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a run that was killed between its last update and its last evaluation, when it is resumed.

        With nothing left to train Lightning skips `on_train_end`; by now it has moved the model off its device.
        """
        if not self._is_fit_ended:
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate without training: `trainer.test()` returns the metrics."""
        self._log(pl_module, self._evaluate(trainer, "test", trainer.current_epoch), logger=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate without training: `trainer.validate()` returns the metrics. Validation in a fit is left alone."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._log(pl_module, self._evaluate(trainer, "validate", trainer.current_epoch), logger=True)

    def _evaluate(self, trainer: Trainer, when: str, num_finished: int) -> dict[str, float]:
        """Metrics under their full names; recorded, printed and, during a fit, sent to the loggers."""
        started = time.perf_counter()
        with isolate_rng(), torch.no_grad():
            groups = rollout_source(trainer, type(self).__name__).evaluate(
                self.split, num_tasks=self.num_tasks, group_size=self.group_size, sampling=self.sampling
            )
        seconds = time.perf_counter() - started
        own = _suite_summary(trainer, groups)
        metrics = joined(evaluation_metrics(groups, self.group_size), own)
        record = self._record(trainer, when, num_finished, metrics, seconds)
        self.results.append(record)
        self.seconds += seconds
        self._evaluated_step = trainer.global_step
        if trainer.is_global_zero:
            self._write(trainer, record, groups)
            print(self.summary(record), *self.kinds(record), *self.estimates(record, own), sep="\n  ", flush=True)
        named = {f"{self.name}/{key}": value for key, value in metrics.items()}
        if trainer.state.fn == TrainerFn.FITTING:
            for logger in trainer.loggers:  # at the number of updates the policy has had: 0 is the untrained one
                logger.log_metrics(named, step=trainer.global_step)
                logger.save()
        return named

    def _log(self, pl_module: LightningModule, metrics: dict[str, float], logger: bool = False) -> None:
        """Show `metrics` to other callbacks; all ranks hold the same numbers, so there is nothing to synchronise."""
        with warnings.catch_warnings():  # `logger` is also what makes `trainer.test()` return them
            warnings.filterwarnings("ignore", message=".*but have no logger configured")
            pl_module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, logger=logger)

    def _record(
        self, trainer: Trainer, when: str, num_finished: int, metrics: dict[str, float], seconds: float
    ) -> EvaluationRecord:
        return {
            "name": self.name,
            "when": when,
            "epoch": num_finished,
            "step": trainer.global_step,
            "split": self.split,
            "num_tasks": int(metrics["num_tasks"]),
            "num_episodes": int(metrics["num_episodes"]),
            "group_size": self.group_size,
            "temperature": self.sampling.temperature,
            "seconds": seconds,
            "budget": _budget(trainer, is_untrained=when == "start"),
            "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
        }

    def _write(self, trainer: Trainer, record: EvaluationRecord, groups: list[TrajectoryGroup]) -> None:
        run = Path(trainer.default_root_dir)
        is_fit = trainer.state.fn == TrainerFn.FITTING
        label = f"{record['epoch']:06d}" if is_fit else record["when"]
        write_records(run / "transcripts" / f"{self.name}_{label}.jsonl", group_records(groups))
        append_line(run / FILE_NAME, json.dumps(record))

    @staticmethod
    def summary(record: EvaluationRecord) -> str:
        """The evaluation in one line."""
        metrics = record["metrics"]
        decoding = "greedy" if record["temperature"] == 0 else f"temperature {record['temperature']:g}"
        facts = [f"{record['num_tasks']} tasks", decoding]
        if (size := record["group_size"]) > 1:
            facts.insert(1, f"{size} episodes each")
            facts.append(f"pass@{size} {_percent(metrics[f'pass_at_{size}'])} %")
        if metrics["failed"]:
            facts.append(f"{metrics['failed']:g} episodes failed")
        share, low, high = (_percent(metrics[key]) for key in INTERVAL)
        return f"{SPLIT_TITLES[record['split']]} success {share} % [{low}, {high}] ({', '.join(facts)})"

    @staticmethod
    def kinds(record: EvaluationRecord) -> list[str]:
        """A line for every kind of task whose outcome is known; empty where there are none or one."""
        metrics = record["metrics"]
        kinds = [key.removeprefix("success/") for key in metrics if key.startswith("success/")]
        names = [kind for kind in kinds if metrics[f"num_tasks/{kind}"]]
        shares = ((name, *(_percent(metrics[f"{key}/{name}"]) for key in INTERVAL)) for name in names)
        lines = [
            f"{name}: {share} % [{low}, {high}] of {metrics[f'num_tasks/{name}']:g}"
            for name, share, low, high in shares
        ]
        return lines if len(lines) > 1 else []

    @staticmethod
    def estimates(record: EvaluationRecord, names: Iterable[str]) -> list[str]:
        """A line for every one of the suite's numbers that has an interval."""
        metrics = record["metrics"]
        shown = [name for name in names if f"{name}_low" in metrics and f"{name}_high" in metrics]
        values = ((name, *(_percent(metrics[f"{name}{end}"]) for end in ("", "_low", "_high"))) for name in shown)
        return [f"{name}: {value} % [{low}, {high}]" for name, value, low, high in values]


def read_evaluations(run: Path) -> list[EvaluationRecord]:
    """The evaluations of a run, oldest first; of those that a resumed run repeated, only the last.

    A line that a kill cut short is left out.
    """
    path = run / FILE_NAME
    latest: dict[tuple[str, str, str, int], EvaluationRecord] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record: EvaluationRecord = json.loads(line)
        except json.JSONDecodeError:
            continue
        key = (record["name"], record["split"], record["when"], record["step"])
        latest.pop(key, None)  # so that the repetition moves to its own place in time
        latest[key] = record
    return list(latest.values())


def _budget(trainer: Trainer, is_untrained: bool) -> dict[str, float]:
    """The run's totals. At the start a collection is done already, but the policy has learnt nothing from it."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
    if not isinstance(datamodule, SpendingSource):
        return {}
    spent, seconds = (Ledger(), 0.0) if is_untrained else (datamodule.totals, datamodule.total_seconds)
    return asdict(spent) | {"seconds": seconds}


def _suite_summary(trainer: Trainer, groups: list[TrajectoryGroup]) -> dict[str, float]:
    """What the suite says of all episodes together; every rank holds them all, so all say the same."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return dict(datamodule.environment.summary(groups)) if isinstance(datamodule, SuiteSource) else {}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
