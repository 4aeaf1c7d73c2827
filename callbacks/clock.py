"""Adds the seconds of updates to what the run has spent."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_agentrl.callbacks.source import SpendingSource


class UpdateClock(Callback):
    """Tells the datamodule how long updates take, from the first micro-batch to the last, and logs the run's seconds.

    The datamodule times what it does itself (collecting, advantages, preparing). Together that is the wall clock of
    training: evaluations, checkpoints and exports stand between iterations and are not in it. The sum is in the
    datamodule's state, so that a resumed run adds up; an iteration that a kill cut short counts as little as its
    tokens do. Logs `budget/total_seconds`.

    Example:
        ```yaml
        trainer:
          callbacks: [{class_path: lit_agentrl.callbacks.UpdateClock}]
        ```
    """

    def __init__(self) -> None:
        self._since = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start with the first micro-batch."""
        if batch_idx == 0:
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Add up at every micro-batch: the sum is whole when the epoch's other callbacks ask, whatever their order.

        Of this rank alone: ranks wait for one another in every update, and a checkpoint holds the first one's seconds.
        """
        now = time.perf_counter()
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
        if isinstance(datamodule, SpendingSource):
            datamodule.total_seconds += now - self._since
        self._since = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the run's seconds up to here."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, SpendingSource):
            pl_module.log(
                "budget/total_seconds", datamodule.total_seconds, batch_size=1, reduce_fx="max", sync_dist=True
            )
