"""One readable line per iteration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.status import Status

from lit_agentrl.callbacks.source import RolloutSource
from lit_agentrl.errors import UserError

HEADER_EVERY = 20  # lines: about a terminal's screen


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as "8.2s", "3m05s" or "1h02m"."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


@dataclass(frozen=True)
class Column:
    """A column of the progress table."""

    title: str
    key: str
    """The metric it shows."""
    width: int
    format: Callable[[float], str]


COLUMNS = (
    Column("reward", "reward/mean", 7, _signed),
    Column("success", "success", 7, _percent),
    Column("loss", "train/loss", 8, _short),
    Column("kl", "train/kl", 8, _short),
    Column("entropy", "train/entropy", 7, _signed),
    Column("clipped", "train/clip_fraction", 7, _percent),
    Column("tokens", "length/action_tokens", 6, _short),
    Column("cut", "truncated", 6, _percent),
    Column("no signal", "zero_signal", 9, _percent),
    Column("failed", "failed", 6, _short),
    Column("skipped", "skipped_updates", 7, _count),
    Column("tok/s", "tokens/per_second", 6, _count),
)


class IterationProgress(Callback):
    """Prints a line per iteration, in columns, and the columns' names every 20 lines; "-" where a metric is missing.

    `tokens` is the mean length of an action, `cut` the share that a token limit cut, `no signal` the share of groups
    whose trajectories all earned the same, `failed` the episodes that the environment broke, `skipped` the updates that
    did not happen (`NonFiniteGuard`), `tok/s` generated tokens over the whole iteration. The collection's numbers are
    read from the datamodule, the rest from `trainer.callback_metrics`. While rollouts are collected in an interactive
    terminal, a spinner shows that something happens. Use with `enable_progress_bar: false`: Lightning's bar would write
    into the lines.

    Args:
        every_n_epochs: Print every so many iterations; the first and the last are always printed.

    Example:
        ```yaml
        trainer:
          enable_progress_bar: false
          callbacks:
            - class_path: lit_agentrl.callbacks.IterationProgress
        ```
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UserError(f"IterationProgress(every_n_epochs={every_n_epochs}) must be at least 1.")
        self.every_n_epochs = every_n_epochs
        self._num_lines = 0
        self._num_iterations = 0
        self._fit_started = 0.0
        self._iteration_started = 0.0
        self._spinner: Status | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks: the first collection comes next."""
        self._num_lines = self._num_iterations = 0
        self._fit_started = self._iteration_started = time.perf_counter()
        self._spin(trainer, "collecting the first rollouts")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for what other callbacks print."""
        self._stop_spinner()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The collection is done."""
        self._stop_spinner()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the iteration."""
        now = time.perf_counter()
        seconds, self._iteration_started = now - self._iteration_started, now
        self._num_iterations += 1
        number, last = trainer.current_epoch + 1, trainer.max_epochs
        is_due = self._num_iterations == 1 or number % self.every_n_epochs == 0 or number == last
        if is_due and trainer.is_global_zero:
            if self._num_lines % HEADER_EVERY == 0:
                print(header(), flush=True)
            self._num_lines += 1
            mean_seconds = (now - self._fit_started) / self._num_iterations
            remaining = None if last is None or last < 0 else mean_seconds * (last - number)
            print(line(number, last, _metrics(trainer, seconds), seconds, remaining), flush=True)
        if number != last and not trainer.should_stop:
            self._spin(trainer, f"collecting rollouts of iteration {number + 1}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is collected any more."""
        self._stop_spinner()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back before messages are printed."""
        self._stop_spinner()

    def _spin(self, trainer: Trainer, text: str) -> None:
        console = Console()
        is_alone = trainer.progress_bar_callback is None  # rich allows one live display
        if console.is_interactive and console.is_terminal and trainer.is_global_zero and is_alone:
            self._spinner = console.status(text, refresh_per_second=2)
            self._spinner.start()

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


def header() -> str:
    """The names of the columns."""
    names = [f"{'iteration':>9}", *(f"{column.title:>{column.width}}" for column in COLUMNS)]
    return "  ".join([*names, f"{'time':>6}", f"{'left':>6}"])


def line(number: int, last: int | None, metrics: Mapping[str, float], seconds: float, remaining: float | None) -> str:
    """Iteration `number` of `last`, aligned with `header`; `remaining` seconds are None where there is no last."""
    total = "" if last is None or last < 0 else f"/{last}"
    cells = [f"{f'{number}{total}':>9}"]
    for column in COLUMNS:
        value = metrics.get(column.key, math.nan)
        cells.append(f"{'-' if math.isnan(value) else column.format(value):>{column.width}}")
    return "  ".join([*cells, f"{duration(seconds):>6}", f"{'-' if remaining is None else duration(remaining):>6}"])


def _metrics(trainer: Trainer, seconds: float) -> dict[str, float]:
    """What is known at the end of the iteration; the datamodule's own numbers win, being of this iteration for sure."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(datamodule, RolloutSource):
        metrics |= datamodule.iteration_metrics
        if "tokens/generated" in metrics:
            metrics["tokens/per_second"] = metrics["tokens/generated"] / seconds
    return metrics
