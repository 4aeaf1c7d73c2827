"""A disk that is full at a chosen moment."""

from pathlib import Path

import lightning as L

FILLER = "filler"


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with (folder / FILLER).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass
    with (folder / FILLER).open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"0")
        except OSError:
            pass


class Fill(L.Callback):
    """Fills the disk in the second iteration, before what comes next in Lightning's order is written.

    The metrics have many columns: a row that fits into the last page of its file needs no room.
    """

    def __init__(self, at: str, folder: str) -> None:
        self.at, self.folder = at, Path(folder)

    def _fill(self, trainer: L.Trainer, at: str) -> None:
        if at == self.at and trainer.current_epoch == 1 and not (self.folder / "emptied").exists():
            fill(self.folder)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fill(trainer, "transcripts")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self._fill(trainer, "metrics")
        if self.at == "metrics":
            pl_module.log_dict({f"column/{i:03d}": float(i) for i in range(1000)}, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fill(trainer, "checkpoint")
