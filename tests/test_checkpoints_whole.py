"""Damage is found without loading, and the last whole checkpoint is named, or gone on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from lit_agentrl.checkpoints import whole
from lit_agentrl.checkpoints.choice import checked, refuse_folder
from lit_agentrl.checkpoints.whole import damage, newest_whole, num_iterations, write_manifest
from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from runs import checkpoint, fit, options

FAST = ("--export.at_end", "false", "--evaluation.every_n_epochs", "0")


def file_at(path: Path, age: float = 0.0) -> Path:
    torch.save({"epoch": 1, "weights": torch.arange(5000.0)}, path)
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))
    return path


def folder_at(path: Path) -> Path:
    path.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (path / name).write_bytes(b"shard" * 100)
    file_at(path / "meta.pt")
    write_manifest(path)
    return path


def cut(path: Path, to: int) -> None:
    os.truncate(path, to)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: cut(path, 0), "empty"),
        (lambda path: cut(path, 1), "no file that torch.save wrote"),
        (lambda path: cut(path, 9000), "cut off"),
        (lambda path: cut(path, path.stat().st_size - 1), "cut off"),
        (lambda path: flip(path, 9000), "is damaged"),
        (lambda path: path.write_text("PK, but no archive at all"), "cut off"),
        (lambda path: path.write_text("not a checkpoint"), "no file that torch.save wrote"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_a_damaged_file_is_found(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    path = file_at(tmp_path / "last.ckpt")
    assert damage(path) == ""
    harm(path)
    assert message in damage(path)


def test_of_a_large_file_the_end_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "READ_WHOLE", 100)
    path = file_at(tmp_path / "last.ckpt")
    assert damage(path) == ""
    cut(path, path.stat().st_size - 30)
    assert "cut off" in damage(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda path: cut(path / "__0_0.distcp", 499), "has 499 bytes instead of 500"),
        (lambda path: flip(path / "meta.pt", 9000), "meta.pt is not what was written"),
        (lambda path: flip(path / "__1_0.distcp", 9), "__1_0.distcp is not what was written"),
        (lambda path: flip(path / ".metadata", 9), ".metadata is not what was written"),
        (lambda path: cut(path / "manifest.json", 20), "manifest.json is damaged"),
        (lambda path: [(path / name).unlink() for name in ("manifest.json", "meta.pt")], "not finished"),
    ],
)
def test_a_damaged_folder_is_found(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    path = folder_at(tmp_path / "last.ckpt")
    assert damage(path) == ""
    assert json.loads((path / "manifest.json").read_text())["bytes"]["__0_0.distcp"] == 500
    harm(path)
    assert message in damage(path)


def test_of_a_large_folder_the_lengths_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "READ_WHOLE", 100)
    path = folder_at(tmp_path / "last.ckpt")
    assert json.loads((path / "manifest.json").read_text())["crc32"] == {}
    flip(path / "__1_0.distcp", 9)
    assert damage(path) == ""
    cut(path / "__1_0.distcp", 499)
    assert "499 bytes instead of 500" in damage(path)


def test_a_checkpoint_says_how_far_it_is(tmp_path: Path) -> None:
    assert num_iterations(file_at(tmp_path / "last.ckpt")) == 2
    assert num_iterations(folder_at(tmp_path / "folder.ckpt")) == 2
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert all(num_iterations(tmp_path / name) is None for name in ("other.ckpt", "text.ckpt", "missing.ckpt"))


def test_a_folder_that_lightning_alone_wrote_is_taken(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "last.ckpt")
    (path / "manifest.json").unlink()
    assert damage(path) == ""


def test_the_newest_whole_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oldest = file_at(tmp_path / "iteration_000000.ckpt", age=20)
    older = file_at(tmp_path / "iteration_000001.ckpt", age=10)
    newest = file_at(tmp_path / "iteration_000002.ckpt")
    last = tmp_path / "last.ckpt"
    os.link(newest, last)
    assert newest_whole(tmp_path) == newest
    assert checked(last, or_older=True) == last
    cut(last, 5000)  # and with it its other name
    assert newest_whole(tmp_path, but=last) == older
    assert checked(last, or_older=True) == older
    assert f"Going on from {older} with iteration 3;" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"cut off.*--ckpt_path {older}"):
        checked(newest, or_older=False)
    cut(older, 10)
    assert checked(last, or_older=True) == oldest
    cut(oldest, 10)
    with pytest.raises(UserError, match="No other in its folder is whole"):
        checked(last, or_older=True)


def test_a_link_to_nothing_is_no_missing_run(tmp_path: Path) -> None:
    """As a kill between the removal of the best file and the renewal of `last.ckpt` leaves."""
    last = tmp_path / "last.ckpt"
    last.symlink_to("iteration_000007.ckpt")
    older = file_at(tmp_path / "iteration_000008.ckpt")
    assert checked(last, or_older=True) == older
    with pytest.raises(UserError, match="no such file"):
        checked(tmp_path / "other.ckpt", or_older=False)


def test_a_folder_is_for_fsdp2_alone(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=f"lit-agentrl consolidate {folder} {tmp_path}/last_whole.ckpt"):
        refuse_folder(folder, "ddp")
    refuse_folder(folder, "fsdp2")
    refuse_folder(folder, "Namespace(class_path='lit_agentrl.strategies.FSDP2Strategy')")
    refuse_folder(file_at(tmp_path / "file.ckpt"), "ddp")


def test_a_run_goes_on_from_the_iteration_before(
    tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    expected = fit(tiny_lm, run)["state_dict"]
    last = run / "checkpoints" / "last.ckpt"
    cut(last, last.stat().st_size // 2)
    with pytest.raises(SystemExit) as end:
        main(options(tiny_lm, run, "--ckpt_path", str(last)))
    assert end.value.code == 2
    assert "iteration_000000.ckpt" in capsys.readouterr().err
    main(options(tiny_lm, run, "--ckpt_path", "last"))
    assert "Going on from" in capsys.readouterr().err
    found = checkpoint(run)
    assert found["epoch"] == 1
    assert all(torch.equal(value, expected[name]) for name, value in found["state_dict"].items())


def test_older_ones_stay_where_the_newest_did_not_reach_the_disk(
    tiny_lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    torch_save = torch.save

    def save(state: dict[str, Any], file: BinaryIO) -> None:
        torch_save(state, file)
        if isinstance(state, dict) and state.get("epoch") == 2:
            file.truncate(1000)  # the disk forgets, without an error

    monkeypatch.setattr(torch, "save", save)
    main(options(tiny_lm, run, "--trainer.max_epochs", "3", *FAST))
    assert "iteration_000002.ckpt was written, but it is cut off" in caplog.text
    names = {path.name for path in (run / "checkpoints").glob("iteration_*.ckpt")}
    assert names == {f"iteration_00000{i}.ckpt" for i in range(3)}
    assert newest_whole(run / "checkpoints") == run / "checkpoints" / "iteration_000001.ckpt"
