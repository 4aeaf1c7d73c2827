"""Updates that would ruin the weights are skipped and counted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_agentrl.errors import UserError


@runtime_checkable
class StepCounter(Protocol):
    """A module that knows how many tokens the current optimiser step learns from, over all micro-batches and ranks."""

    num_step_tokens: int


class NonFiniteGuard(Callback):
    """Skips updates whose loss or gradients are not finite, and those with nothing to learn from.

    A skipped update leaves no gradients: AdamW then touches neither weights nor moments, weight decay included, while
    learning-rate schedule and `global_step` go on. The check comes after the gradients are complete and before they are
    clipped (norm clipping would turn one infinite gradient into NaN everywhere). All ranks decide alike.

    Logs `skipped_updates`: how many of the iteration's updates were skipped.

    Args:
        max_skipped: Stop after so many non-finite updates in a row. Updates with nothing to learn (the module's
            `num_step_tokens` is 0) neither count here nor end the row.

    Example:
        ```yaml
        trainer:
          callbacks:
            - class_path: lit_agentrl.callbacks.NonFiniteGuard
              init_args: {max_skipped: 5}
        ```
    """

    def __init__(self, max_skipped: int = 5) -> None:
        if max_skipped < 1:
            raise UserError(f"NonFiniteGuard(max_skipped={max_skipped}) must be at least 1.")
        self.max_skipped = max_skipped
        self.num_skipped = 0
        """Updates skipped since training began."""
        self._num_in_a_row = 0
        self._is_loss_finite: Tensor | None = None
        self._clip_value: float | None = None

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self._num_in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over `state_dict`."""
        self.num_skipped, self._num_in_a_row = state_dict["num_skipped"], state_dict["num_in_a_row"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the micro-batch's loss, without waiting for the device."""
        is_finite = loss.detach().isfinite().all()
        self._is_loss_finite = is_finite if self._is_loss_finite is None else self._is_loss_finite & is_finite

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of an update that must not happen."""
        is_loss_finite = self._is_loss_finite is None or bool(self._is_loss_finite)
        self._is_loss_finite = None
        is_finite = is_loss_finite and gradients_are_finite(_parameters(optimizer))
        is_finite = trainer.strategy.reduce_boolean_decision(is_finite, all=True)
        has_tokens = not isinstance(pl_module, StepCounter) or pl_module.num_step_tokens > 0
        is_skipped = not is_finite or not has_tokens
        pl_module.log("skipped_updates", float(is_skipped), on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        if is_skipped:
            optimizer.zero_grad(set_to_none=True)
            # clip_grad_value_ crashes where no parameter has a gradient (torch 2.13)
            self._clip_value, trainer.gradient_clip_val = trainer.gradient_clip_val, None
            self.num_skipped += 1
        if not is_finite:
            self._num_in_a_row += 1
            self._stop_if_hopeless(trainer.current_epoch + 1, is_loss_finite)
        elif has_tokens:
            self._num_in_a_row = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Clip again from the next update on."""
        if self._clip_value is not None:
            trainer.gradient_clip_val, self._clip_value = self._clip_value, None

    def _stop_if_hopeless(self, iteration: int, is_loss_finite: bool) -> None:
        if self._num_in_a_row < self.max_skipped:
            return
        culprit = "gradients" if is_loss_finite else "loss"
        raise UserError(
            f"The {culprit} of {self._num_in_a_row} updates in a row was NaN or infinite, up to iteration {iteration}. "
            "These updates were skipped, so the weights are still those of the last good one. Resume from last.ckpt "
            "with a lower learning rate, a lower trainer.gradient_clip_val, or trainer.precision=32-true; if it "
            "happens at once, check the rewards for NaN. NonFiniteGuard(max_skipped=...) sets the limit."
        )


def gradients_are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every gradient on this rank is finite: one fused pass, one wait for the device.

    The largest magnitude is taken, not the Euclidean norm: squares of large finite float32 gradients overflow.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    shards = [shard for shard in shards if shard.numel() > 0]  # a rank may hold nothing of a small parameter
    return not shards or bool(torch.isfinite(get_total_norm(shards, norm_type=math.inf)))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
