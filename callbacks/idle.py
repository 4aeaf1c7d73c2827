"""A fit that trained nothing does not look like one that did."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_agentrl.errors import UserError


class IdleGuard(Callback):
    """Says that a resumed run was finished already, and lets a fresh one that trained nothing fail.

    Lightning ends both well, and what comes after would take the untrained weights for a result. To be named before the
    callbacks that evaluate and export at the end.
    """

    def __init__(self) -> None:
        self._num_batches = 0
        self._num_saved: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember how far the resumed run is."""
        self._num_saved = checkpoint["epoch"] + 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Something was trained."""
        self._num_batches += 1

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look back.

        Raises:
            UserError: Nothing was trained, now or before.
        """
        num_batches, self._num_batches = self._num_batches, 0
        if num_batches:
            return
        if self._num_saved is None:
            raise UserError(
                f"Nothing was trained: trainer.max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
                f"limit_train_batches={trainer.limit_train_batches}, and the datamodule gave "  # type: ignore[attr-defined]
                f"{trainer.num_training_batches} batches. Each of them has to be at least 1 (-1: without limit)."
            )
        if trainer.is_global_zero:
            print(
                f"This run was finished: {self._num_saved} iterations are saved, and no more were asked for, so "
                "nothing was trained. To go on raise --trainer.max_epochs, or the budget.",
                flush=True,
            )
