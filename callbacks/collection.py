"""Logs what the datamodule measured while it collected an iteration."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer


@runtime_checkable
class MeasuredSource(Protocol):
    """A datamodule that keeps numbers of its last collection, already reduced over ranks."""

    iteration_metrics: dict[str, float]


class CollectionMetrics(Callback):
    """Sends the datamodule's `iteration_metrics` (rewards, success, lengths, stop reasons, phases) to the loggers.

    Example:
        ```yaml
        trainer:
          callbacks: [{class_path: lit_agentrl.callbacks.CollectionMetrics}]
        ```
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collection is done when an epoch starts. Every rank holds the same numbers: nothing to synchronise."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
        if isinstance(datamodule, MeasuredSource):
            pl_module.log_dict(dict(datamodule.iteration_metrics), on_step=False, on_epoch=True, batch_size=1)
