"""A callback that writes down one optimiser step: its rows, its loss, its gradient."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_agentrl import distributed
from lit_agentrl.doctor.checkup import take_weights
from lit_agentrl.doctor.contract import gradients
from lit_agentrl.doctor.contract.facts import Difference, Facts, Unit, write
from lit_agentrl.doctor.contract.moved import move_weights
from lit_agentrl.errors import UserError
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.shards import is_sharded
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.types import PreferenceBatch, TrainBatch

BASELINE_FOLDER = "baseline"


class Recorder(L.Callback):
    """Records the fit's first optimiser step, and ends the fit after it.

    Args:
        folder: Where `facts.json` goes. One named `baseline` gets the gradient too; any other run compares its own with
            that of the `baseline` beside it.
        ckpt_path: A checkpoint to take the weights from.
        weights_only: As in `fit`.

    Raises:
        UserError: There is no such folder, or no baseline to compare with.
    """

    def __init__(self, folder: Path, ckpt_path: str | None = None, weights_only: bool | None = None) -> None:
        self.folder, self.baseline = folder, folder.parent / BASELINE_FOLDER
        if not folder.is_dir():
            raise UserError(f"--record {folder}: there is no such folder.")
        if folder != self.baseline and not (self.baseline / gradients.FOLDER).is_dir():
            raise UserError(
                f"--record {folder}: {self.baseline} holds no step to compare with. Record that first, or let "
                "--contract true do both."
            )
        self.ckpt_path, self.weights_only = ckpt_path, weights_only
        self._units: list[Unit] = []
        self._lengths: list[int] = []
        self._sizes: list[int] = []
        self._losses: list[float] = []
        self._num_micro_batches = self._num_rows = self._num_updates = 0
        self._began = self._seconds = 0.0
        self._norm: float | None = None
        self._difference: Difference | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the checkpoint's weights, and move all a little."""
        if not isinstance(pl_module, LanguageModule):
            raise UserError(f"The contract is for modules of lit_agentrl.methods, not {type(pl_module).__name__}.")
        if self.ckpt_path is not None:
            take_weights(trainer, pl_module, self.ckpt_path, self.weights_only)
        move_weights(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rows."""
        self._began = self._began or time.perf_counter()
        if self._norm is not None:
            return
        self._num_updates = batch.num_updates
        if batch.action_mask.any():
            self._num_micro_batches += 1
            self._num_rows += int(batch.action_mask.any(-1).sum())
            self._lengths.append(int(batch.lengths.max()))
            self._units += units_of(batch)
            self._sizes.append(rows_per_unit(batch) * int(batch.lengths.max()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Keep the gradient, or compare it: it is complete here, and not clipped yet."""
        if self._norm is not None:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._seconds = time.perf_counter() - self._began
        if self.folder == self.baseline:
            self._norm = gradients.save(pl_module, self.folder)
        else:
            self._norm, self._difference = gradients.compare(pl_module, self.baseline)
        trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what was differentiated."""
        self._losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the facts."""
        assert isinstance(pl_module, LanguageModule)
        facts = self._facts(trainer, pl_module)
        if trainer.is_global_zero:
            write(facts, self.folder)

    def _facts(self, trainer: L.Trainer, module: LanguageModule) -> Facts:
        size = distributed.world()[1]
        units = sorted(unit for share in distributed.gather(self._units) for unit in share)
        if not units:
            raise UserError(
                "No row to train on: every episode failed, or was left out. Look at the environment's errors with "
                "`lit-agentrl evaluate`, or raise --num_prompts."
            )
        assert self._norm is not None
        policy: Any = module.policy
        logged = trainer.callback_metrics.get("train/loss")
        most = distributed.reduce_integers(
            [self._num_micro_batches, max(self._lengths, default=0), max(self._sizes, default=0), _peak(module.device)],
            "max",
        )
        return Facts(
            model=f"{type(base_lm(policy.lm)).__name__} ({module.pretrained})",
            precision=_precision(trainer, policy),
            device=str(module.device),
            ranks=size,
            is_sharded=is_sharded(policy),
            shares=module.shares_prefixes,
            refusal=str(getattr(policy, "refusal", "")),
            micro_batches=most[0],
            rows_per_rank=distributed.gather(self._num_rows),
            units=units,
            longest=most[1],
            largest_unit=most[2],
            loss=distributed.reduce_floats([sum(self._losses)])[0] / size,
            logged=None if logged is None else float(logged) * self._num_updates,
            norm=self._norm,
            num_weights=sum(p.numel() for p in module.parameters() if p.requires_grad),
            seconds=self._seconds,
            peak_bytes=most[3],
            difference=self._difference,
        )


def rows_per_unit(batch: TrainBatch) -> int:
    """Rows that belong together: those of a pair."""
    return batch.rows_per_pair if isinstance(batch, PreferenceBatch) else 1


def units_of(batch: TrainBatch) -> Iterator[Unit]:
    """The rows with a loss, or the pairs that hold one, as they are told apart and compared between runs."""
    size = rows_per_unit(batch)
    for first in range(0, len(batch.lengths), size):
        rows = range(first, first + size)
        if not batch.action_mask[first : first + size].any():
            continue
        denominators = [batch.token_denominator, batch.row_denominator]
        if isinstance(batch, PreferenceBatch):
            denominators.append(batch.num_pairs)
        text = hashlib.sha256(" ".join(f"{value:.6g}" for value in denominators).encode())
        for row in rows:
            length = int(batch.lengths[row])
            text.update(str(batch.token_ids[row, :length].tolist()).encode())
            text.update(str(batch.action_mask[row, :length].tolist()).encode())
            if isinstance(batch.vision, VisionInputs):
                text.update(str([batch.vision.content_ids[image] for image in batch.vision.shown[row]]).encode())
        yield text.hexdigest()[:16], *_moments(batch.advantages, rows), *_moments(batch.old_logprobs, rows)


def _moments(values: Tensor, rows: range) -> tuple[float, float]:
    """Sum and squares over some rows of [B, L]."""
    chosen = values[rows.start : rows.stop].double()
    return float(chosen.sum()), float(chosen.square().sum())


def _precision(trainer: L.Trainer, policy: Any) -> str:
    weights = str(base_lm(policy.lm).dtype).removeprefix("torch.")
    return weights if trainer.precision.startswith(("32", "64")) else f"{weights} under {trainer.precision}"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
