"""A checkpoint after every iteration, and how to go on from it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException

from lit_agentrl.callbacks.checkpoint_io import remove_stale_files
from lit_agentrl.checkpoints.whole import damage, write_manifest
from lit_agentrl.errors import UserError
from lit_agentrl.files import TEMPORARY_SUFFIX, is_disk_full, room_for, sync_folder

log = logging.getLogger(__name__)


class IterationCheckpoint(ModelCheckpoint):
    """Saves after every iteration to `<run>/checkpoints`, and says how to resume when the run is stopped.

    At the end of an iteration the rollouts are spent and the state is small: a resumed run goes on bit by bit as if it
    had not been stopped, and a kill loses the iteration in flight at most. The newest file is `last.ckpt`. With
    `AtomicCheckpointIO` it is readable at every moment: `iteration_<epoch>.ckpt` is written, its predecessor deleted,
    and `last.ckpt`, a hard link (Lightning would write everything a second time), is replaced in one rename.

    Of a sharded policy (`save_distributed_checkpoint: true`) a checkpoint is a folder with a file from each rank. It is
    written as `<name>.tmp` and renamed when all ranks are done, and `last.ckpt` is a link to the newest.

    Changed against `ModelCheckpoint`: `last.ckpt` is also renewed in iterations that are not among the best of
    `monitor`, and after the last iteration whatever the schedule.

    Args:
        dirpath: The folder; `<run>/checkpoints` by default, whatever the logger.
        filename: Name of the numbered files; `epoch` counts from 0 as in Lightning.
        monitor: A metric to keep the best files by, such as "eval/success"; None keeps the newest.
        mode: Whether a larger or a smaller `monitor` is better.
        save_top_k: Numbered files to keep: 0, 1 or -1 (all) without `monitor`.
        keep: With `save_top_k` 1 and no `monitor`, how many of the newest to keep: an older one to go on from, should
            the newest be damaged.
        every_n_epochs: Save every so many iterations.

    Example:
        ```yaml
        trainer:
          plugins: [{class_path: lit_agentrl.callbacks.AtomicCheckpointIO}]
          callbacks: [{class_path: lit_agentrl.callbacks.IterationCheckpoint}]
        ```
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "iteration_{epoch:06d}",
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        save_top_k: int = 1,
        keep: int = 2,
        every_n_epochs: int = 1,
    ) -> None:
        if keep < 1:
            raise UserError(f"IterationCheckpoint(keep={keep}) must be at least 1.")
        if every_n_epochs < 1:
            raise UserError(f"IterationCheckpoint(every_n_epochs={every_n_epochs}) must be at least 1.")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,  # a metric's "/" would make folders
            enable_version_counter=False,  # a resumed run would leave last.ckpt behind and write last-v1.ckpt
        )
        self.keep = keep
        self._older: list[str] = []  # files that newer ones have replaced, still there, the oldest first
        self._num_saved = 0  # iterations that the newest checkpoint holds
        self._config_paths: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder and clear what a killed run left in it."""
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")
        with warnings.catch_warnings():  # a resumed run meets its own files; the command line checks fresh ones
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            remove_stale_files(Path(self.dirpath))
        # asked for now: `log_dir` talks to the other ranks, which an exception may have left behind
        folders = [trainer.default_root_dir, *([trainer.log_dir] if trainer.log_dir else [])]
        self._config_paths = [Path(folder) / "config.yaml" for folder in folders]

    def state_dict(self) -> dict[str, Any]:
        """What `ModelCheckpoint` keeps, and the older files."""
        return super().state_dict() | {"older": self._older}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state_dict`."""
        super().load_state_dict(state_dict)
        self._older = [path for path in state_dict.get("older", []) if Path(path).parent == Path(str(self.dirpath))]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember how far the resumed run is."""
        self._num_saved = checkpoint["epoch"] + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the iteration."""
        super().on_train_epoch_end(trainer, pl_module)
        num_finished = trainer.current_epoch + 1
        is_end = num_finished == trainer.max_epochs or trainer.should_stop  # early stopping has decided by now
        is_due = is_end or num_finished % self._every_n_epochs == 0
        if is_due and not self._should_skip_saving_checkpoint(trainer):  # the base class saved no numbered file
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what is saved and how to go on."""
        super().on_exception(trainer, pl_module, exception)
        is_stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if is_fit and trainer.is_global_zero and (is_stopped or self._num_saved):
            print(f"\n{self.resume_hint(trainer)}", file=sys.stderr, flush=True)

    def resume_hint(self, trainer: Trainer) -> str:
        """What is saved, and the command that goes on from it."""
        config = next((path for path in self._config_paths if path.is_file()), None)
        config_argument = "CONFIG.yaml" if config is None else shlex.quote(str(config))
        if self._num_saved == 0:
            return f"Nothing is saved yet: start again.\n  lit-agentrl fit --config {config_argument}"
        last = Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        total = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        return (
            f"Iteration {self._num_saved}{total} is saved. Resume with:\n"
            f"  lit-agentrl fit --config {config_argument} --ckpt_path {shlex.quote(str(last))}"
        )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save, or link to what this very step saved (the hook through which `ModelCheckpoint` writes)."""
        if not self._link(trainer, filepath):
            if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
                self._save_folder(trainer, Path(filepath))
            else:
                super()._save_checkpoint(trainer, filepath)
        self._num_saved = trainer.current_epoch + 1

    def _save_folder(self, trainer: Trainer, path: Path) -> None:
        """Let all ranks write beside the place, then put the folder there."""
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        if trainer.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        trainer.strategy.barrier("IterationCheckpoint")
        with room_for(path):
            try:
                super()._save_checkpoint(trainer, str(temporary))
                trainer.strategy.barrier("IterationCheckpoint")
                if trainer.is_global_zero:
                    write_manifest(temporary)
            except BaseException as error:
                if trainer.is_global_zero:
                    shutil.rmtree(temporary, ignore_errors=True)
                # what went wrong on which rank, and itself no `Exception`
                failures = error.failures if isinstance(error, CheckpointException) else {}
                if cause := next((cause for cause, _ in failures.values() if is_disk_full(cause)), None):
                    raise cause from None
                raise
        if trainer.is_global_zero:
            _replace_folder(path, temporary)
        trainer.strategy.barrier("IterationCheckpoint")
        self._last_checkpoint_saved = str(path)

    def _link(self, trainer: Trainer, filepath: str) -> bool:
        """Make `filepath` a link to what was saved in this very step; False, on all ranks, where it cannot be."""
        source = self._last_checkpoint_saved
        if not source or source == filepath or self._last_global_step_saved != trainer.global_step:
            return False
        is_linked = trainer.is_global_zero and _link_atomically(Path(source), Path(filepath))
        return trainer.strategy.broadcast(is_linked)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Note the newest file as an older one, before the state that is saved in the next."""
        if self.best_model_path and self.best_model_path not in self._older:
            self._older.append(self.best_model_path)
        super()._save_none_monitor_checkpoint(trainer, monitor_candidates)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Delete what a newer file has replaced, or, where the newest are kept, what has become too old."""
        if self.monitor is not None:
            self._delete(trainer, filepath)
            return
        reason = damage(Path(self.best_model_path), thorough=False) if trainer.is_global_zero else ""
        if reason:  # a disk, or whoever shares it, has spoilt what was written a moment ago
            log.warning("%s was written, but %s. Older checkpoints are kept.", self.best_model_path, reason)
            return
        while len(self._older) > self.keep - 1:
            self._delete(trainer, self._older.pop(0))

    def _delete(self, trainer: Trainer, filepath: str) -> None:
        path, last = Path(filepath), Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        if not path.is_dir():
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            if last.exists() and last.samefile(path):  # a link, renewed later: for that long it would lead nowhere
                _link_atomically(Path(str(self._last_checkpoint_saved)), last)
            _delete_folder(path)


def _link_atomically(source: Path, target: Path) -> bool:
    """Replace `target` by a hard link to a file, or a symbolic one to a folder; False on systems without such."""
    if not source.exists() or (target.is_dir() and not target.is_symlink() and not source.is_dir()):
        return False
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    try:
        temporary.unlink(missing_ok=True)
        if source.is_dir():
            temporary.symlink_to(os.path.relpath(source, target.parent))
            if target.is_dir() and not target.is_symlink():
                _delete_folder(target)
        else:
            os.link(source, temporary)
        temporary.replace(target)
    except OSError:
        return False
    sync_folder(target.parent)
    return True


def _replace_folder(target: Path, new: Path) -> None:
    """Put `new` in the place of `target`."""
    sync_folder(new)
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        _delete_folder(target)
    new.rename(target)
    sync_folder(target.parent)


def _delete_folder(folder: Path) -> None:
    """Take a folder away in one rename, then its files: a kill leaves none under its name that lacks some of them."""
    doomed = folder.with_name(f"{folder.stem}.old{folder.suffix}{TEMPORARY_SUFFIX}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
