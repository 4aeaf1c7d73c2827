"""Where the time of an iteration goes, tokens per second, and peak memory."""

from __future__ import annotations

import resource
import sys
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_agentrl.callbacks.evaluation import Evaluation
from lit_agentrl.callbacks.source import RolloutSource

GIB = 2**30


class Throughput(Callback):
    """Logs once an iteration, beside the datamodule's own `time/collect`.

    - `time/iteration`: wall seconds since the last iteration ended, everything included.
    - `time/update`: from the first micro-batch to the last, the GPU's work included.
    - `time/evaluate`: in `Evaluation` callbacks; place this callback after them.
    - `tokens/generated_per_second` of the collection, `tokens/trained_per_second` of the update, and
      `tokens/per_second`: generated tokens over the whole iteration. Tokens are of all ranks, times of this one.
    - `memory/peak_gib`: peak resident memory of the largest rank so far; `memory/peak_gpu_gib`: the same of its GPU.

    With a datamodule that collects no rollouts the token rates are left out.

    Example:
        ```yaml
        trainer:
          callbacks:
            - class_path: lit_agentrl.callbacks.Throughput
        ```
    """

    def __init__(self) -> None:
        self._iteration_started = 0.0
        self._update_started = 0.0
        self._update_ended = 0.0
        self._evaluated_before = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: the first collection comes next."""
        self._iteration_started = time.perf_counter()
        self._evaluated_before = _evaluation_seconds(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The collection is done; the update comes next."""
        self._update_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Remember when the update ended: other callbacks' work at the end of the epoch does not count."""
        if pl_module.device.type == "cuda" and trainer.is_last_batch:
            torch.cuda.synchronize(pl_module.device)  # it would still be computing, and the next collection would wait
        self._update_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the iteration."""
        now = time.perf_counter()
        evaluated = _evaluation_seconds(trainer)
        times = {
            "time/iteration": now - self._iteration_started,
            "time/update": self._update_ended - self._update_started,
            "time/evaluate": evaluated - self._evaluated_before,
        }
        self._iteration_started, self._evaluated_before = now, evaluated
        pl_module.log_dict(times | _token_rates(trainer, times), batch_size=1)
        # the largest rank decides whether the next run fits
        pl_module.log_dict(peak_memory(pl_module.device), batch_size=1, reduce_fx="max", sync_dist=True)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, GiB: resident, and on `device` where that is a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if device.type == "cuda":
        peak["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return peak


def _token_rates(trainer: Trainer, times: dict[str, float]) -> dict[str, float]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, RolloutSource):
        return {}
    metrics = datamodule.iteration_metrics
    generated, trained = metrics.get("tokens/generated", 0.0), metrics.get("tokens/trained", 0.0)
    collecting = metrics.get("time/rollouts", metrics.get("time/collect", 0.0))  # what ran in the background is longer
    return {
        "tokens/generated_per_second": _rate(generated, collecting),
        "tokens/trained_per_second": _rate(trained, times["time/update"]),
        "tokens/per_second": _rate(generated, times["time/iteration"]),
    }


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _evaluation_seconds(trainer: Trainer) -> float:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of Lightning's
    return sum(callback.seconds for callback in callbacks if isinstance(callback, Evaluation))
