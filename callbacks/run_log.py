"""The run's metrics as a CSV file that a full disk or a kill leaves whole."""

from __future__ import annotations

import csv
import io
import logging
import os
from pathlib import Path

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_agentrl.files import DiskFullError, room_for, write_text

log = logging.getLogger(__name__)


class RunLog(CSVLogger):
    """Lightning's `CSVLogger`, where rows that are written stay written.

    A metric that is logged for the first time gives the file another header: Lightning then empties the file and writes
    it anew, so that a kill or a full disk in between takes all earlier rows. Here it is replaced in one rename, and a
    row that found no room is taken back.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """What writes the file; it is made when it is first asked for."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; after an exception a full disk is no second one."""
        try:
            super().finalize(status)
        except DiskFullError as error:
            if status != "failed":
                raise
            log.warning("The last rows of the metrics are lost: %s", error)


class _Writer(ExperimentWriter):
    _size: int | None = None
    """Of the file as it was last whole; None before there is one."""

    def save(self) -> None:
        """Append the rows, all of them or none."""
        path = Path(self.metrics_file_path)
        with room_for(path):
            self._size = path.stat().st_size if path.exists() else None
            try:
                super().save()
            except OSError:
                if self._size is None:
                    path.unlink(missing_ok=True)
                else:
                    os.truncate(path, self._size)
                raise

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
        self._size = path.stat().st_size
