import io
import re
import time

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import Evaluation, IterationProgress, NonFiniteGuard, Throughput, progress
from lit_agentrl.callbacks.progress import COLUMNS, duration, header, line
from lit_agentrl.callbacks.throughput import peak_memory
from lit_agentrl.errors import UserError


class NoRollouts(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(4, 3), batch_size=2)


def logged(run):
    """The rows of metrics.csv that hold an iteration's times."""
    names, *rows = [text.split(",") for text in (run / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    return [{key: float(value) for key, value in row.items() if value} for row in rows if row["time/iteration"]]


def cells(text):
    return text.split()


def test_one_line_per_iteration_in_columns(tmp_path, capsys):
    callbacks = [NonFiniteGuard(), IterationProgress()]
    trainer(tmp_path, *callbacks, max_epochs=3).fit(FakeModule(), datamodule=FakeRollouts())
    names, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert {len(text) for text in (names, *lines)} == {len(names)}
    for title in ("success", "tok/s", "left"):  # a value ends where its name ends
        end = names.index(title) + len(title)
        assert all(text[end - 1] != " " and text[end : end + 1] in ("", " ") for text in lines)
    first = cells(lines[0])
    assert first[:3] == ["1/3", "0.500", "25.0%"]
    assert float(first[3]) > 0  # the loss
    assert first[4:8] == ["-", "-", "-", "-"]  # kl, entropy, clipped, tokens
    assert first[8:12] == ["12.5%", "0.0%", "1", "0"]
    assert cells(lines[-1])[-1] == "0.0s"  # nothing left


def test_the_line_is_of_this_iteration(tmp_path, capsys):
    """The datamodule's numbers may be logged after this callback; they must not lag by one."""

    class Data(FakeRollouts):
        def train_dataloader(self):
            loader = super().train_dataloader()
            self.iteration_metrics["reward/mean"] = float(self.collected)
            return loader

    class Module(FakeModule):
        def on_train_epoch_end(self):
            self.log_dict(self.trainer.datamodule.iteration_metrics)

    trainer(tmp_path, IterationProgress(), max_epochs=3).fit(Module(), datamodule=Data())
    assert [cells(text)[1] for text in capsys.readouterr().out.splitlines()[1:]] == ["0.000", "1.000", "2.000"]


def test_the_header_comes_back_every_twenty_lines(tmp_path, capsys):
    trainer(tmp_path, IterationProgress(), max_epochs=41).fit(FakeModule(), datamodule=FakeRollouts(1))
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, text in enumerate(lines) if text == header()] == [0, 21, 42]
    assert len(lines) == 44


def test_schedule_keeps_the_first_and_the_last(tmp_path, capsys):
    trainer(tmp_path, IterationProgress(3), max_epochs=7).fit(FakeModule(), datamodule=FakeRollouts(1))
    assert [cells(text)[0] for text in capsys.readouterr().out.splitlines()[1:]] == ["1/7", "3/7", "6/7", "7/7"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_that_rollouts_are_collected(tmp_path, monkeypatch, is_terminal):
    """A log file does not: it would fill with frames of the spinner."""
    monkeypatch.setenv("TERM", "xterm")  # rich draws nothing on a "dumb" one
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, force_interactive=is_terminal, width=80)
    monkeypatch.setattr(progress, "Console", lambda: console)
    shown = []

    class Data(FakeRollouts):
        def train_dataloader(self):
            shown.append(callback._spinner is not None)
            return super().train_dataloader()

    callback = IterationProgress()
    trainer(tmp_path, callback, max_epochs=2).fit(FakeModule(), datamodule=Data())
    assert shown == [is_terminal] * 2
    assert callback._spinner is None
    for text in ("collecting the first rollouts", "collecting rollouts of iteration 2"):
        assert (text in screen.getvalue()) == is_terminal
    assert "iteration 3" not in screen.getvalue()


def test_works_without_rollouts(tmp_path, capsys):
    trainer(tmp_path, Throughput(), IterationProgress(), max_epochs=1).fit(FakeModule(), datamodule=NoRollouts())
    row = cells(capsys.readouterr().out.splitlines()[1])
    assert row[:3] == ["1/1", "-", "-"]
    assert float(row[3]) > 0


def test_time_left_and_open_ends():
    metrics = {column.key: 0.0 for column in COLUMNS}
    assert cells(line(3, 10, metrics, 61.0, 4000.0))[-2:] == ["1m01s", "1h06m"]
    assert cells(line(3, -1, {}, 1.0, None)) == ["3", *["-"] * len(COLUMNS), "1.0s", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0.0s"), (59.94, "59.9s"), (59.96, "1m00s"), (3599.6, "1h00m"), (7380, "2h03m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_refuses_an_interval_below_one():
    with pytest.raises(UserError, match="every_n_epochs=0"):
        IterationProgress(0)


def test_time_is_split_into_phases(tmp_path):
    """Sleeps of known length end up in the phase they happened in."""

    class Data(FakeRollouts):
        def train_dataloader(self):
            if self.trainer.fit_loop.epoch_progress.current.processed != self.collected:
                time.sleep(0.1)
            return super().train_dataloader()

        def evaluate(self, *arguments, **options):
            time.sleep(0.2)
            return super().evaluate(*arguments, **options)

    def slow_loss(prediction, step):
        time.sleep(0.15)
        return prediction.square().mean()

    callbacks = [Evaluation(every_n_epochs=2), Throughput()]
    run = trainer(tmp_path, *callbacks, max_epochs=3, logger=CSVLogger(tmp_path, name="", version=""))
    run.fit(FakeModule(slow_loss), datamodule=Data(num_batches=2))
    rows = logged(tmp_path)
    assert [row["time/evaluate"] for row in rows] == pytest.approx([0.2, 0.2, 0.0], abs=0.09)  # at the start; after 2
    assert [row["time/update"] for row in rows] == pytest.approx([0.3] * 3, abs=0.14)
    for row in rows:
        rest = row["time/iteration"] - row["time/evaluate"] - row["time/update"]
        assert 0.1 <= rest < 0.3  # the collection, and little else
        assert row["tokens/generated_per_second"] == 50.0  # 100 tokens in the 2 s that the datamodule reports
        assert row["tokens/trained_per_second"] == pytest.approx(60 / row["time/update"])
        assert row["tokens/per_second"] == pytest.approx(100 / row["time/iteration"])


def test_rates_need_rollouts_and_memory_does_not(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, Throughput(), max_epochs=1, logger=logger).fit(FakeModule(), datamodule=NoRollouts())
    (row,) = logged(tmp_path)
    assert not any(re.match("tokens/", key) for key in row)
    assert row["time/evaluate"] == 0
    assert row["memory/peak_gib"] > 0


def test_peak_memory_is_in_gib():
    """Against the system's own count, which also sees what was freed since."""
    before = peak_memory(torch.device("cpu"))["memory/peak_gib"]
    status = dict(text.split(":", 1) for text in open("/proc/self/status").read().splitlines())  # noqa: SIM115
    assert before == pytest.approx(int(status["VmHWM"].split()[0]) / 2**20, rel=0.02)
