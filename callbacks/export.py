"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from lit_agentrl.callbacks.source import policy_lm, tokenizer_of
from lit_agentrl.errors import UserError


class HFExport(Callback):
    """Writes weights, configuration and tokenizer where `from_pretrained` finds them: `<run>/<folder>`.

    The folder appears whole and only when training ended well, so that the next stage of a pipeline may take its being
    there as "this stage is done"; exports on schedule go to `<run>/<folder>_iteration_<epoch>`.

    Args:
        folder: Name of the folder in the run folder, or an absolute path.
        every_n_epochs: Also export after every so many iterations; 0 for never.
        at_end: Export when training has ended; not after an exception or an interrupt.
        merge: Merge adapters into the weights; otherwise write the adapters alone.

    Example:
        ```yaml
        trainer:
          callbacks:
            - class_path: lit_agentrl.callbacks.HFExport
        ```
    """

    def __init__(
        self, folder: str = "export", every_n_epochs: int = 0, at_end: bool = True, merge: bool = True
    ) -> None:
        if every_n_epochs < 0:
            raise UserError(f"HFExport(every_n_epochs={every_n_epochs}): 0 for never, or a number of iterations.")
        self.folder = folder
        self.every_n_epochs = every_n_epochs
        self.at_end = at_end
        self.merge = merge
        self._is_fit_ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that gives weights away inside of its step alone, before anything is loaded."""
        if stage == "fit" and isinstance(trainer.strategy, FSDPStrategy) and (self.at_end or self.every_n_epochs):
            raise UserError(
                "FSDPStrategy (FSDP1): the policy cannot be exported while it is sharded so. Set --export.at_end false "
                "and --export.every_n_epochs 0 and resume the finished run with one process (--ckpt_path last "
                "--trainer.strategy auto --trainer.devices 1), which exports it; or use --trainer.strategy fsdp2."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module or datamodule that cannot be exported before anything is trained."""
        policy_lm(pl_module, type(self).__name__)
        tokenizer_of(trainer, type(self).__name__)
        self._is_fit_ended = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on schedule."""
        epoch = trainer.current_epoch
        if self.every_n_epochs and (epoch + 1) % self.every_n_epochs == 0:
            self._export(trainer, pl_module, f"{self.folder}_iteration_{epoch:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the trained policy. Lightning calls neither this nor `on_fit_end` after an exception."""
        self._is_fit_ended = True
        if self.at_end and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # a trial run must not look like a result
            self._export(trainer, pl_module, self.folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export a run that was killed between its last update and its export, when it is resumed.

        With nothing left to train Lightning skips `on_train_end`.
        """
        if not self._is_fit_ended:
            self.on_train_end(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        """Write on rank 0; the others help to gather what is sharded, and wait."""
        from lit_agentrl.models.export import export  # imports transformers: seconds that no start-up needs to pay

        path, user = Path(trainer.default_root_dir) / name, type(self).__name__
        export(policy_lm(pl_module, user), tokenizer_of(trainer, user), path, merge=self.merge)
        trainer.strategy.barrier("HFExport")
        if trainer.is_global_zero:
            print(f"exported the policy to {path}", flush=True)
