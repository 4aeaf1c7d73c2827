"""A run goes on under another number of ranks, another strategy, in another form, and ends with the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_agentrl.checkpoints.consolidate import consolidate
from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from runs import checkpoint, options, run_alone

FSDP2 = '{"class_path": "FSDP2Strategy"}'
SHARDS = '{"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": true}}'
PLACES = {
    "one": (),
    "ddp 2": ("--trainer.strategy", "ddp", "--trainer.devices", "2"),
    "fsdp2 1": ("--trainer.strategy", FSDP2, "--trainer.devices", "1"),
    "fsdp2 2": ("--trainer.strategy", FSDP2, "--trainer.devices", "2"),
    "shards 1": ("--trainer.strategy", SHARDS, "--trainer.devices", "1"),
    "shards 2": ("--trainer.strategy", SHARDS, "--trainer.devices", "2"),
}
FULL = {
    "one": ["ddp 2", "fsdp2 2"],
    "ddp 2": ["one", "fsdp2 1"],
    "fsdp2 2": ["one", "ddp 2", "fsdp2 1"],
    "shards 2": ["shards 2", "shards 1", "one"],
    "shards 1": ["shards 2"],
}
LORA = {"ddp 2": ["fsdp2 2"], "fsdp2 2": ["one", "ddp 2"], "one": ["fsdp2 2"], "shards 2": ["shards 1", "one"]}
MORE = (
    "--data.num_prompts",
    "3",
    "--data.max_tokens",
    "256",
    "--data.num_passes",
    "2",
    "--evaluation.every_n_epochs",
    "0",
)
KL = ("--model.kl_coef", "0.1", "--model.reference", '{"mode": "sync", "sync_every": 3}')


def play(lm: str, run: Path, place: str, epochs: int, *more: str) -> str:
    small = ("--trainer.max_epochs", str(epochs), "--export.at_end", "false", "--evaluation.every_n_epochs", "0")
    code, output = run_alone(options(lm, run, *MORE, *KL, *small, *PLACES[place], *more))
    assert code == 0, output
    return output


def weights(run: Path) -> dict[str, Any]:
    """The last checkpoint's weights, from a file or from shards."""
    last = run / "checkpoints" / "last.ckpt"
    if not last.is_dir():
        return checkpoint(run)["state_dict"]
    consolidate(last, run / "whole.ckpt")
    return torch.load(run / "whole.ckpt", weights_only=True)["state_dict"]


def resumed(lm: str, first: Path, folder: Path, place: str, *more: str) -> Path:
    """A copy of a run of two iterations, gone on with for a third."""
    shutil.copytree(first, folder, symlinks=True)
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_dir() and "shards" not in place:
        with pytest.raises(UserError, match="lit-agentrl consolidate"):
            main_raising(options(lm, folder, *PLACES[place], "--ckpt_path", str(last)))
        consolidate(last, folder / "file.ckpt")
        last = folder / "file.ckpt"
    play(lm, folder, place, 3, *more, "--ckpt_path", str(last))
    return folder


def main_raising(arguments: list[str]) -> None:
    from lit_agentrl.lightning_cli import run

    run(arguments)


def check(lm: str, folder: Path, table: dict[str, list[str]], *more: str) -> None:
    play(lm, folder / "whole", "one", 3, *more)
    expected = weights(folder / "whole")
    play(lm, folder / "short", "one", 2, *more)
    moved = [float((expected[name] - value).abs().max()) for name, value in weights(folder / "short").items()]
    assert max(moved) > 1e-3  # the third iteration counts
    for start, goals in table.items():
        first = folder / start
        play(lm, first, start, 2, *more)
        for goal in goals:
            found = weights(resumed(lm, first, folder / f"{start} to {goal}", goal, *more))
            if "shards" in goal:  # they hold what is frozen as well
                found = {name: value for name, value in found.items() if name in expected}
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                message = f"{start} to {goal}: {name}"
                torch.testing.assert_close(
                    found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=message: f"{name}: {text}"
                )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many short runs
def test_a_full_fine_tuning_goes_on_elsewhere(tiny_lm: str, tmp_path: Path) -> None:
    check(tiny_lm, tmp_path, FULL, "--model.lora", "null")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many short runs
def test_an_adapter_goes_on_elsewhere(tiny_lm: str, tmp_path: Path) -> None:
    check(tiny_lm, tmp_path, LORA)


def test_only_a_whole_folder_becomes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "last.ckpt"
    with pytest.raises(UserError, match="no folder of shards"):
        consolidate(folder, tmp_path / "x")
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"1234")
    with pytest.raises(UserError, match="not finished"):
        consolidate(folder, tmp_path / "x")
    with pytest.raises(SystemExit):
        main(["consolidate", str(folder), str(tmp_path / "x")])
    assert "not finished" in capsys.readouterr().err
