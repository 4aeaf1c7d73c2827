"""Ends a run when it has spent what it may."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_agentrl.callbacks.clock import UpdateClock
from lit_agentrl.callbacks.source import SpendingSource
from lit_agentrl.errors import UserError

PATIENCE = 10
"""Iterations after which a capped number that is still 0 is taken for one that nobody counts."""


class BudgetStop(Callback):
    """Ends training after the iteration with which the run reaches a cap, whichever comes first.

    The end is a normal one: the last evaluation, checkpoint and export happen. Caps are on the run's totals (all ranks,
    resumed parts included, evaluations not): a run that is resumed with its budget spent starts no iteration. The last
    iteration is played to its end, so a run spends up to an iteration more than its cap. Logs `budget/stopped`.

    Args:
        generated_tokens: Sampled tokens, those of episodes that were thrown away included.
        tool_calls: Calls as environments count them (`metrics["tool_calls"]`).
        seconds: Wall clock of training without evaluations; needs `UpdateClock` among the callbacks.

    Raises:
        UserError: A cap is not above 0.

    Example:
        ```yaml
        trainer:
          callbacks:
            - class_path: lit_agentrl.callbacks.UpdateClock
            - class_path: lit_agentrl.callbacks.BudgetStop
              init_args: {generated_tokens: 2000000}
        ```
    """

    def __init__(
        self, generated_tokens: int | None = None, tool_calls: int | None = None, seconds: float | None = None
    ) -> None:
        given = {"generated_tokens": generated_tokens, "tool_calls": tool_calls, "seconds": seconds}
        self.caps: dict[str, float] = {name: cap for name, cap in given.items() if cap is not None}
        for name, cap in self.caps.items():
            if not cap > 0:
                raise UserError(f"BudgetStop({name}={cap}): a cap must be above 0; null is no cap.")
        self.reason = ""
        """Which cap was reached; empty before."""
        self._num_iterations = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be counted before the first rollout is paid for."""
        self._num_iterations = 0
        if not self.caps:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
        if not isinstance(datamodule, SpendingSource):
            raise UserError(
                f"BudgetStop({', '.join(self.caps)}): {type(datamodule).__name__} keeps no ledger of what is spent. "
                "Use RolloutDataModule, or limit the run by --trainer.max_epochs."
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of Lightning's
        if "seconds" in self.caps and not any(isinstance(callback, UpdateClock) for callback in callbacks):
            raise UserError(
                "BudgetStop(seconds=...) needs the callback UpdateClock, which times the updates: add it to "
                "`trainer.callbacks`."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a resumed run whose budget is spent end where it is. The datamodule has its totals back by now.

        Lightning collects before it asks any callback whether to stop, but takes a run of `max_epochs` for finished.
        """
        if self._decide(trainer):
            trainer.fit_loop.max_epochs = checkpoint["epoch"] + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where a cap is reached."""
        if not self.caps:
            return
        self._num_iterations += 1
        if self._decide(trainer):
            trainer.should_stop = True
        elif self._num_iterations == PATIENCE:
            self._check_counted(trainer)
        pl_module.log("budget/stopped", float(bool(self.reason)), batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why, after the last iteration's line."""
        if self.reason and trainer.is_global_zero:
            print(f"training ends: {self.reason}", flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why no iteration was started: with nothing to train Lightning skips `on_train_end`."""
        if self._num_iterations == 0:
            self.on_train_end(trainer, pl_module)

    def _decide(self, trainer: Trainer) -> bool:
        """Whether a cap is reached, alike on all ranks: their clocks differ by little, but they do."""
        spent = _spent(trainer)
        reached = next((name for name, cap in self.caps.items() if spent.get(name, 0.0) >= cap), None)
        # not reached on all <=> reached on any
        is_reached = not trainer.strategy.reduce_boolean_decision(reached is None, all=True)
        if is_reached:
            name = reached or next(iter(self.caps))
            self.reason = f"{spent[name]:,.0f} {TITLES[name]} spent, the budget is {self.caps[name]:,.0f}"
        return is_reached

    def _check_counted(self, trainer: Trainer) -> None:
        spent = _spent(trainer)
        for name in self.caps:
            if spent[name] == 0:
                raise UserError(
                    f"budget.{name}={self.caps[name]:g}, but {PATIENCE} iterations counted no {TITLES[name]} at all, "
                    "so the cap would never be reached. Is it an environment that counts them? Cap another number."
                )


TITLES = {"generated_tokens": "generated tokens", "tool_calls": "tool calls", "seconds": "seconds of training"}


def _spent(trainer: Trainer) -> dict[str, float]:
    """The run's totals by the names of the caps."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, SpendingSource):
        return {}
    totals = datamodule.totals
    return {
        "generated_tokens": totals.generated_tokens,
        "tool_calls": totals.tool_calls,
        "seconds": datamodule.total_seconds,
    }
