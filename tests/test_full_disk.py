"""A disk that fills up: the run says which file found no room and how to go on, and loses the iteration at most."""

import csv
import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disk_parts import FILLER, fill
from lit_agentrl import models
from lit_agentrl.callbacks import RunLog
from lit_agentrl.checkpoints.whole import damage, num_iterations
from lit_agentrl.cli import main
from lit_agentrl.files import DiskFullError, append_line, is_disk_full, replace_atomically, room_for
from lit_agentrl.models.export import export
from runs import checkpoint, fit, options, run_alone

SIZE = 48  # MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs, which only root may")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def arguments(lm: str, run: Path, at: str, *more: str) -> list[str]:
    init = f'{{"at": "{at}", "folder": "{run.parent}"}}'
    callbacks = f'[{{"class_path": "disk_parts.Fill", "init_args": {init}}}]'
    return [*options(lm, run), "--trainer.callbacks", callbacks, "--evaluation.every_n_epochs", "0", *more]


def make_room(disk: Path) -> None:
    (disk / FILLER).unlink()
    (disk / "emptied").touch()


@pytest.fixture(scope="module")
def whole(tiny_lm, tmp_path_factory):
    """The last weights of a run with room."""
    return fit(tiny_lm, tmp_path_factory.mktemp("whole") / "run", "--evaluation.every_n_epochs", "0")["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "path", "saved"),
    [
        ("transcripts", "transcripts/iteration_000001.jsonl", 1),
        ("metrics", "logs/version_0/metrics.csv", 1),
        ("checkpoint", "checkpoints/iteration_000001.ckpt", 1),
        ("export", "export", 2),
    ],
)
def test_a_full_disk_costs_an_iteration_at_most(tiny_lm, disk, capfd, monkeypatch, whole, at, path, saved):
    run = disk / "run"
    if at == "export":
        monkeypatch.setattr(models.export, "export", lambda *args, **kwargs: (fill(disk), export(*args, **kwargs)))
    with pytest.raises(SystemExit) as end:
        main(arguments(tiny_lm, run, at))
    assert end.value.code == 2
    text = capfd.readouterr().err
    assert f"error: {run / path} could not be written: the disk is full" in text
    assert f"0.0 MiB of {SIZE}.0 MiB are free" in text
    assert "Make room there" in text
    assert f"Iteration {saved} of 2 is saved. Resume with:" in text
    assert f"--ckpt_path {run}/checkpoints/last.ckpt" in text
    assert "Traceback" not in text
    assert checkpoint(run)["epoch"] == saved - 1
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".export")]
    if at == "metrics":  # the rows before are there, and no half one
        rows = list(csv.reader((run / path).open()))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    make_room(disk)
    monkeypatch.undo()
    main(arguments(tiny_lm, run, at, "--ckpt_path", "last"))
    resumed = checkpoint(run)
    assert resumed["epoch"] == 1
    torch.testing.assert_close(resumed["state_dict"], whole, rtol=0, atol=0)
    assert (run / "export" / "config.json").is_file()


@pytest.mark.slow
def test_shards_without_room_leave_the_folder_before(tiny_lm, disk):
    """What torch raises then is no `Exception`, and a page long."""
    run = disk / "run"
    strategy = '{"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": true}}'
    more = ("--trainer.strategy", strategy, "--trainer.devices", "1", "--model.lora", "null")
    code, text = run_alone(arguments(tiny_lm, run, "checkpoint", *more))
    assert code == 2
    assert f"error: {run}/checkpoints/iteration_000001.ckpt could not be written: the disk is full" in text
    assert f"--ckpt_path {run}/checkpoints/last.ckpt" in text
    assert "Traceback" not in text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_000000.ckpt", "last.ckpt"]
    assert damage(run / "checkpoints" / "last.ckpt") == ""
    make_room(disk)
    code, text = run_alone(arguments(tiny_lm, run, "checkpoint", *more, "--ckpt_path", "last"))
    assert code == 0, text
    assert num_iterations(run / "checkpoints" / "last.ckpt") == 2


def test_what_is_written_to_a_full_disk_is_as_before(disk):
    """Both ways of writing, through torch too, which wraps the system's error in one of its own."""
    path = disk / "state.pt"
    replace_atomically(path, lambda file: torch.save(torch.ones(3), file))
    append_line(disk / "lines", "one")
    for write in (
        lambda: replace_atomically(path, lambda file: torch.save(torch.zeros(2**18 * SIZE), file)),
        lambda: append_line(disk / "lines", "x" * 2**20 * SIZE),
    ):
        with pytest.raises(DiskFullError, match="could not be written: the disk is full"):
            write()
    assert torch.equal(torch.load(path, weights_only=True), torch.ones(3))
    assert (disk / "lines").read_text().startswith("one\n")
    assert sorted(p.name for p in disk.iterdir()) == ["lines", "state.pt"]


def test_the_run_log_takes_back_a_row_without_room(tmp_path, monkeypatch):
    """After a new column has had the file written anew, too: the rows before stay."""
    log = RunLog(str(tmp_path), name="logs")
    log.log_metrics({"a": 1.0}, step=0)
    log.save()
    path = Path(log.log_dir) / "metrics.csv"
    rows = csv.DictWriter.writerows

    def half(writer, records):
        if len(records := list(records)) == 1 and "b" in records[0]:
            writer.writer.writerow(["half"])
            raise OSError(errno.ENOSPC, "No space left on device")
        return rows(writer, records)

    monkeypatch.setattr(csv.DictWriter, "writerows", half)
    log.log_metrics({"b": 2.0}, step=1)
    with pytest.raises(DiskFullError, match=r"metrics\.csv could not be written"):
        log.save()
    assert path.read_text().split() == ["a,b,step", "1.0,,0"]
    log.finalize("failed")  # no second exception
    with pytest.raises(DiskFullError):
        log.finalize("success")
    monkeypatch.undo()
    log.save()
    assert path.read_text().split() == ["a,b,step", "1.0,,0", ",2.0,1"]


def test_other_errors_are_what_they_were(tmp_path):
    for error in (OSError(errno.EACCES, "no"), RuntimeError("no space, says the model")):
        with pytest.raises(type(error)) as caught, room_for(tmp_path / "x"):
            raise error
        assert caught.value is error
    assert is_disk_full(OSError(errno.EDQUOT, "quota"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(None)
