"""What both datamodules hand to Lightning: ready micro-batches, and the number of the epoch they are for."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
from torch.utils.data import IterableDataset

from lit_agentrl.types import TrainBatch


class Batches(IterableDataset[TrainBatch]):
    """Ready micro-batches, sized. Iterable, because Lightning would split map-style data between ranks once more."""

    def __init__(self, batches: list[TrainBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[TrainBatch]:
        """In order."""
        return iter(self.batches)

    def __len__(self) -> int:
        """How many."""
        return len(self.batches)


def finished_epochs(trainer: L.Trainer) -> int:
    """How many epochs are done. `current_epoch` lags by one just after a resume; this counter does not."""
    processed: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return processed
