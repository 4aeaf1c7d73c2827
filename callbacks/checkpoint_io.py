"""Checkpoint files that are whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_agentrl.files import TEMPORARY_SUFFIX, replace_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes `<path>.tmp` in the same folder, syncs it to the disk, then renames it over `path`.

    Lightning 2.6 writes local checkpoints through a temporary file in the system's temporary folder and moves it: where
    that is another file system the move is a copy, and a kill during the copy leaves half a file in the place of the
    last good one. It also serialises into memory first; this streams.

    Example:
        ```yaml
        trainer:
          plugins:
            - class_path: lit_agentrl.callbacks.AtomicCheckpointIO
        ```
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; the previous file stays readable until the new one is complete."""
        if "://" in str(path) or storage_options is not None:  # remote stores have their own transactions
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            replace_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def remove_stale_files(folder: Path) -> list[Path]:
    """Delete what writers that were killed left in `folder`, and give the paths."""
    stale = sorted(folder.glob(f"*.ckpt{TEMPORARY_SUFFIX}"))
    for path in stale:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return stale
