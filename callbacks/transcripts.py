"""What the policy said and what it earned: one file per iteration, a few samples in the terminal."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lit_agentrl.callbacks.records import (
    TrajectoryRecord,
    group_records,
    render_transcript,
    sample_records,
    write_records,
)
from lit_agentrl.callbacks.source import rollout_source
from lit_agentrl.distributed import is_leader
from lit_agentrl.errors import UserError

LOG_FILE_WIDTH = 120  # columns where the output is no terminal; rich would fall back to 80


class Transcripts(Callback):
    """Writes every trajectory of an iteration to `<run>/transcripts/iteration_<epoch>.jsonl`, one JSON line each.

    The file is written right after the collection, so that it is there when the update fails. With several ranks each
    writes its own groups (`iteration_000012.rank1.jsonl`). Lines are `records.TrajectoryRecord`s.

    Args:
        every_n_epochs: Write every so many iterations, the first included.
        show: Sample trajectories to print, from the lowest to the highest reward; 0 prints none.
        show_every: Print them every so many iterations, the first included.
        max_files: Keep only the newest so many files of this rank; None keeps all.

    Example:
        ```yaml
        trainer:
          callbacks:
            - class_path: lit_agentrl.callbacks.Transcripts
              init_args: {show: 2, show_every: 10}
        ```
    """

    def __init__(
        self, every_n_epochs: int = 1, show: int = 2, show_every: int = 10, max_files: int | None = None
    ) -> None:
        if every_n_epochs < 1 or show < 0 or show_every < 1 or (max_files is not None and max_files < 1):
            raise UserError(
                f"Transcripts(every_n_epochs={every_n_epochs}, show={show}, show_every={show_every}, "
                f"max_files={max_files}): intervals and max_files must be at least 1, show at least 0."
            )
        self.every_n_epochs = every_n_epochs
        self.show = show
        self.show_every = show_every
        self.max_files = max_files

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and show what was just collected."""
        epoch = trainer.current_epoch
        is_written = epoch % self.every_n_epochs == 0
        is_shown = self.show > 0 and trainer.is_global_zero and epoch % self.show_every == 0
        if not is_written and not is_shown:
            return
        records = group_records(rollout_source(trainer, type(self).__name__).groups)
        if is_written and is_leader():
            self._write(trainer, epoch, records)
        if is_shown:
            show_transcripts(sample_records(records, self.show))

    def _write(self, trainer: Trainer, epoch: int, records: list[TrajectoryRecord]) -> None:
        folder = Path(trainer.default_root_dir) / "transcripts"
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        write_records(folder / f"iteration_{epoch:06d}{rank}.jsonl", records)
        if self.max_files is not None:
            for path in sorted(folder.glob(f"iteration_{'[0-9]' * 6}{rank}.jsonl"))[: -self.max_files]:
                path.unlink(missing_ok=True)


def show_transcripts(records: list[TrajectoryRecord]) -> None:
    """Print each record as a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_FILE_WIDTH)
    for record in records:
        console.print(render_transcript(record))
