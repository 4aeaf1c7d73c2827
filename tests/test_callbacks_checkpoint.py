import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import AtomicCheckpointIO, IterationCheckpoint, stop_on_sigterm
from lit_agentrl.callbacks.checkpoint import _replace_folder
from lit_agentrl.callbacks.checkpoint_io import remove_stale_files
from lit_agentrl.checkpoints.whole import MANIFEST, META, damage, num_iterations, write_manifest
from lit_agentrl.errors import UserError


class Raise(Callback):
    """Raises at a hook of iteration `epoch`."""

    def __init__(self, exception, epoch, hook="on_train_epoch_start"):
        def raise_(trainer, *_):
            if trainer.current_epoch == epoch:
                raise exception

        setattr(self, hook, raise_)


def fit(run, *callbacks, module=None, ckpt_path=None, **options):
    module = module or FakeModule()
    plugins = [AtomicCheckpointIO()]
    fitter = trainer(run, *callbacks, plugins=plugins, enable_checkpointing=True, **options)
    fitter.fit(module, datamodule=FakeRollouts(), ckpt_path=ckpt_path)
    return module


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"]


@pytest.mark.parametrize(("keep", "kept"), [(1, (2,)), (2, (1, 2)), (3, (0, 1, 2))])
def test_keeps_the_newest_iterations_and_last(tmp_path, keep, kept):
    fit(tmp_path, IterationCheckpoint(keep=keep), max_epochs=3)
    folder = tmp_path / "checkpoints"
    assert names(folder) == [*(f"iteration_00000{number}.ckpt" for number in kept), "last.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "iteration_000002.ckpt")  # written once
    assert not (folder / "last.ckpt").is_symlink()
    assert epoch_of(folder / "last.ckpt") == 2


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    """Noise comes from the datamodule's generator alone here: what `FakeModule` draws globally is switched off."""
    monkeypatch.setattr(torch, "rand", lambda *size: torch.zeros(*size))
    whole = fit(tmp_path / "a", IterationCheckpoint(), max_epochs=4)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "b", IterationCheckpoint(), Raise(RuntimeError("killed"), 2), max_epochs=4)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path / "b", IterationCheckpoint(), max_epochs=4, ckpt_path=last)
    assert torch.equal(torch.stack(whole.weights[-4:]), torch.stack(resumed.weights))
    # no last-v1, no leftover
    assert names(last.parent) == ["iteration_000002.ckpt", "iteration_000003.ckpt", "last.ckpt"]


def test_last_is_renewed_when_the_monitored_metric_is_not_the_best(tmp_path):
    """`ModelCheckpoint` would leave `last.ckpt` at the best iteration, and a resume would lose all after it."""

    class Module(FakeModule):
        def on_train_epoch_end(self):
            self.log("score", float(-self.current_epoch))

    fit(tmp_path, IterationCheckpoint(monitor="score"), module=Module(), max_epochs=3)
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["iteration_000000.ckpt", "last.ckpt"]
    assert (epoch_of(folder / "iteration_000000.ckpt"), epoch_of(folder / "last.ckpt")) == (0, 2)


@pytest.mark.parametrize(
    ("every", "saved"), [(2, ["iteration_000001.ckpt", "iteration_000003.ckpt", "last.ckpt"]), (9, ["last.ckpt"])]
)
def test_the_last_iteration_is_saved_whatever_the_schedule(tmp_path, every, saved):
    fit(tmp_path, IterationCheckpoint(every_n_epochs=every), max_epochs=5)
    assert names(tmp_path / "checkpoints") == saved
    assert epoch_of(tmp_path / "checkpoints" / "last.ckpt") == 4


def test_the_last_iteration_is_saved_when_training_stops_early(tmp_path):
    class Score(FakeModule):
        def on_train_epoch_end(self):
            self.log("score", 1.0)

    stop_early = EarlyStopping("score", patience=2, check_on_train_epoch_end=True)
    fit(tmp_path, IterationCheckpoint(every_n_epochs=9), stop_early, module=Score(), max_epochs=50)
    assert epoch_of(tmp_path / "checkpoints" / "last.ckpt") == 2


def test_only_last_when_no_numbered_files_are_wanted(tmp_path):
    fit(tmp_path, IterationCheckpoint(save_top_k=0), max_epochs=2)
    assert names(tmp_path / "checkpoints") == ["last.ckpt"]
    assert epoch_of(tmp_path / "checkpoints" / "last.ckpt") == 1


def test_all_files_are_kept_and_last_is_a_second_file_where_links_do_not_work(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    fit(tmp_path, IterationCheckpoint(save_top_k=-1), max_epochs=2)
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["iteration_000000.ckpt", "iteration_000001.ckpt", "last.ckpt"]
    assert not (folder / "last.ckpt").samefile(folder / "iteration_000001.ckpt")
    assert epoch_of(folder / "last.ckpt") == 1


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk, for one."""
    path, io = tmp_path / "x" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"value": torch.ones(3)}, path)

    def half(checkpoint, file):
        file.write(b"PK half of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="the disk is full"):
        io.save_checkpoint({"value": torch.zeros(3)}, path)
    assert names(path.parent) == ["last.ckpt"]
    assert io.load_checkpoint(path, weights_only=True)["value"].tolist() == [1, 1, 1]


def start(script, **values):
    code = textwrap.dedent(script).format(tests=str(Path(__file__).parent), **values)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


KILLED_WRITERS = """
    import os, pathlib, signal, sys
    import torch
    sys.path.insert(0, {tests!r})
    from callback_parts import FakeModule, FakeRollouts, trainer
    from lit_agentrl.callbacks import AtomicCheckpointIO, IterationCheckpoint

    def die_at(module, name, count, when):
        original, calls = getattr(module, name), [0]
        def replacement(*arguments, **options):
            calls[0] += 1
            if calls[0] == count:
                if when == "half":
                    arguments[1].write(b"PK half of a checkpoint")
                    arguments[1].flush()
                elif when == "after":
                    original(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        setattr(module, name, replacement)

    for label, target in {targets!r}.items():
        if os.fork() == 0:
            module, *rest = target
            die_at({{"torch": torch, "os": os, "Path": pathlib.Path}}[module], *rest)
            options = dict(max_epochs=5, plugins=[AtomicCheckpointIO()], enable_checkpointing=True)
            run = trainer({folder!r} + "/" + label, IterationCheckpoint(), **options)
            run.fit(FakeModule(), datamodule=FakeRollouts())
            os._exit(0)
        print("killed by", os.WTERMSIG(os.wait()[1]))
"""


def left(*numbered, last):
    return {f"iteration_00000{epoch}.ckpt": epoch for epoch in numbered} | {"last.ckpt": last}


KILLS = {  # what, in the third iteration, and which files then hold which epoch
    "half written": (("torch", "save", 3, "half"), left(0, 1, last=1)),
    "before the rename": (("Path", "replace", 5, "before"), left(0, 1, last=1)),
    "after the rename": (("Path", "replace", 5, "after"), left(0, 1, 2, last=1)),
    "linked": (("os", "link", 3, "after"), left(1, 2, last=1)),
    "saved": (("Path", "replace", 6, "after"), left(1, 2, last=2)),
}


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """A folder with one run for each of `KILLS`, ended by `kill -9` there."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(KILLED_WRITERS, folder=str(folder), targets={label: target for label, (target, _) in KILLS.items()})
    output, _ = process.communicate(timeout=120)
    assert output.count(f"killed by {signal.SIGKILL.value}") == len(KILLS), output
    return folder


@pytest.mark.parametrize("label", KILLS)
def test_kill_9_while_saving_the_third_iteration(killed_runs, label):
    """An iteration renames twice, its numbered file and last.ckpt: at every point between, last.ckpt is whole."""
    folder = killed_runs / label / "checkpoints"
    assert {path.name: epoch_of(path) for path in folder.glob("*.ckpt")} == KILLS[label][1]
    fit(killed_runs / label, IterationCheckpoint(), max_epochs=5, ckpt_path=folder / "last.ckpt")
    assert epoch_of(folder / "last.ckpt") == 4
    assert not list(folder.glob("*.tmp"))


def test_files_of_killed_writers_are_removed_and_others_are_not(tmp_path):
    for name in ("last.ckpt.tmp", "iteration_000001.ckpt.tmp", "last.ckpt", "notes.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in remove_stale_files(tmp_path)] == ["iteration_000001.ckpt.tmp", "last.ckpt.tmp"]
    assert names(tmp_path) == ["last.ckpt", "notes.tmp"]


def folder_of_shards(path):
    path.mkdir()
    torch.save({"epoch": int(path.stem.rpartition("_")[2])}, path / META)
    (path / "__0_0.distcp").write_bytes(b"weights")
    write_manifest(path)
    return path


def killed_in_rmtree(folder, ignore_errors=False):
    if folder.exists():
        (folder / MANIFEST).unlink()
        raise KeyboardInterrupt


@pytest.mark.parametrize("monitor", [None, "score"])
def test_a_kill_while_an_older_folder_is_deleted_leaves_no_part_of_it_under_its_name(tmp_path, monkeypatch, monitor):
    """Without its manifest, and with Lightning's own file, what is left of it would pass for a whole one."""
    older, newest = (folder_of_shards(tmp_path / f"iteration_00000{number}.ckpt") for number in range(2))
    last = tmp_path / "last.ckpt"
    last.symlink_to(older.name)
    callback = IterationCheckpoint(dirpath=str(tmp_path), monitor=monitor, keep=1)
    callback.best_model_path = callback._last_checkpoint_saved = str(newest)
    callback._older = [str(older)]

    monkeypatch.setattr(shutil, "rmtree", killed_in_rmtree)
    with pytest.raises(KeyboardInterrupt):
        callback._remove_checkpoint(SimpleNamespace(is_global_zero=True), str(older))
    monkeypatch.undo()
    assert names(tmp_path) == ["iteration_000000.old.ckpt.tmp", "iteration_000001.ckpt", "last.ckpt"]
    assert last.resolve() == newest  # it pointed to the older one, and would lead nowhere until it is renewed
    assert not damage(last)
    assert [path.name for path in remove_stale_files(tmp_path)] == ["iteration_000000.old.ckpt.tmp"]


def test_a_folder_takes_the_place_of_one_that_a_killed_run_had_finished(tmp_path, monkeypatch):
    target, new = folder_of_shards(tmp_path / "iteration_000001.ckpt"), folder_of_shards(tmp_path / "new_2")

    monkeypatch.setattr(shutil, "rmtree", killed_in_rmtree)
    with pytest.raises(KeyboardInterrupt):
        _replace_folder(target, new)
    assert names(tmp_path) == ["iteration_000001.old.ckpt.tmp", "new_2"]
    monkeypatch.undo()
    _replace_folder(target, new)
    assert num_iterations(target) == 3
    assert names(target) == ["__0_0.distcp", MANIFEST, META]


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("bug")])
def test_says_how_to_resume(tmp_path, capfd, exception):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").touch()
    with pytest.raises((SystemExit, RuntimeError)):
        fit(run, IterationCheckpoint(), Raise(exception, 2), max_epochs=5)
    assert (
        "\nIteration 2 of 5 is saved. Resume with:\n"
        f"  lit-agentrl fit --config '{run}/config.yaml' --ckpt_path '{run}/checkpoints/last.ckpt'\n"
    ) in capfd.readouterr().err


def test_says_when_there_is_nothing_to_resume(tmp_path, capfd):
    with pytest.raises(SystemExit):
        fit(tmp_path, IterationCheckpoint(), Raise(KeyboardInterrupt(), 0))
    assert "Nothing is saved yet: start again.\n  lit-agentrl fit --config CONFIG.yaml" in capfd.readouterr().err
    with pytest.raises(RuntimeError):  # an error speaks for itself
        fit(tmp_path, IterationCheckpoint(), Raise(RuntimeError("bug"), 0))
    assert "saved" not in capfd.readouterr().err


def test_a_resumed_run_that_is_stopped_again_knows_what_is_saved(tmp_path, capfd):
    fit(tmp_path, IterationCheckpoint(), max_epochs=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit):
        fit(tmp_path, IterationCheckpoint(), Raise(KeyboardInterrupt(), 2), max_epochs=4, ckpt_path=last)
    assert "Iteration 2 of 4 is saved" in capfd.readouterr().err


def test_an_evaluation_of_a_checkpoint_is_nothing_to_resume(tmp_path, capfd):
    fit(tmp_path, IterationCheckpoint(), max_epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    callbacks = [IterationCheckpoint(), Raise(KeyboardInterrupt(), 0, "on_test_epoch_end")]
    with pytest.raises(SystemExit):
        trainer(tmp_path, *callbacks, enable_checkpointing=True).test(
            FakeModule(), datamodule=FakeRollouts(), ckpt_path=last
        )
    assert "Resume" not in capfd.readouterr().err


def test_refuses_an_interval_below_one_and_to_keep_nothing():
    with pytest.raises(UserError, match="every_n_epochs=0"):
        IterationCheckpoint(every_n_epochs=0)
    with pytest.raises(UserError, match="keep=0"):
        IterationCheckpoint(keep=0)


LONG_COLLECTION = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from callback_parts import FakeModule, FakeRollouts, trainer
    from lit_agentrl.callbacks import AtomicCheckpointIO, IterationCheckpoint, stop_on_sigterm

    class Slow(FakeRollouts):
        def train_dataloader(self):
            if self.trainer.fit_loop.epoch_progress.current.processed == 2:
                print("collecting", flush=True)
                for _ in range(600):
                    time.sleep(0.1)
            return super().train_dataloader()

    with stop_on_sigterm():
        options = dict(max_epochs=5, plugins=[AtomicCheckpointIO()], enable_checkpointing=True)
        trainer({run!r}, IterationCheckpoint(), **options).fit(FakeModule(), datamodule=Slow())
"""


def test_sigterm_ends_a_long_collection_at_once(tmp_path):
    process = start(LONG_COLLECTION, run=str(tmp_path))
    while "collecting" not in (text := process.stdout.readline()):
        assert text, "the run ended before its third collection"
    stopped = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - stopped < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert "Iteration 2 of 5 is saved. Resume with:" in output
    assert not re.search("Traceback", output)


def test_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_sigterm_is_left_alone():
    seen = []

    def inside():
        with stop_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
