"""configs/trainer/*.yaml: after an experiment's file they change where it runs, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from lit_agentrl.cli import main
from rank_runs import run_ranks
from runs import ECHO, ROOT, checkpoint, options

FOLDER = ROOT / "configs" / "trainer"
FILES = sorted(FOLDER.glob("*.yaml"))
STRATEGIES = {
    "cpu": "auto",
    "single_gpu": "auto",
    "ddp": "ddp",
    "fsdp2": "lit_agentrl.strategies.FSDP2Strategy",
    "fsdp2_multinode": "lit_agentrl.strategies.FSDP2Strategy",
    "fsdp1": "lightning.pytorch.strategies.FSDPStrategy",
}
LARGE = sorted((ROOT / "configs" / "experiment").glob("*7b.yaml"))
SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `--print_config` shows."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert not stop.value.code
    shown: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return shown


def class_of(strategy: Any) -> str:
    return str(strategy["class_path"] if isinstance(strategy, dict) else strategy)


def test_every_file_is_known() -> None:
    assert {path.stem for path in FILES} == STRATEGIES.keys()
    assert len(LARGE) == 3


def test_the_page_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text()
    named = set(re.findall(r"(?:configs|tests)/[\w./]+\.(?:yaml|py)", text)) - {"configs/experiment/NAME.yaml"}
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert all(path.name in text for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_only_the_trainer_changes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Model and data of the experiment stay, whichever class they are of."""
    before = printed(capsys, "--config", ECHO)
    after = printed(capsys, "--config", ECHO, "--config", str(path))
    changed = {section for section in before if before[section] != after[section]}
    assert changed <= {"trainer", "export"}
    assert class_of(after["trainer"]["strategy"]) == STRATEGIES[path.stem]
    named = yaml.safe_load(path.read_text())["trainer"]
    assert {"accelerator", "devices", "num_nodes", "strategy", "precision"} <= named.keys(), (
        "a recipe may set any of these: the file has to say its own"
    )
    assert after["trainer"]["max_epochs"] == before["trainer"]["max_epochs"] == 4


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_large_recipes_take_sharding(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As their comments say: all weights, in float32, sharded."""
    assert "configs/trainer/fsdp2.yaml" in path.read_text()
    words = ("--config", str(path), "--config", str(FOLDER / "fsdp2.yaml"), "--trainer.devices", "4")
    shown = printed(capsys, *words, "--model.lora", "null", "--model.dtype", "float32")
    assert class_of(shown["trainer"]["strategy"]) == STRATEGIES["fsdp2"]
    assert int(shown["trainer"]["devices"]) == 4
    assert shown["model"]["init_args"]["lora"] is None
    assert shown["model"]["init_args"]["gradient_checkpointing"] is True


@pytest.mark.slow
def test_cpu_ddp_and_fsdp2_train_the_same(tiny_lm: str, tmp_path: Path) -> None:
    """The files as they are, with two CPU processes in the place of GPUs."""

    def run(name: str, *more: str) -> list[str]:
        config = ("--config", str(FOLDER / f"{name}.yaml"), "--trainer.accelerator", "cpu")
        return options(tiny_lm, tmp_path / name, *config, *SGD, "--trainer.precision", "32-true", *more)

    main(run("cpu"))
    run_ranks([run(name, "--trainer.devices", "2") for name in ("ddp", "fsdp2")])
    found = {name: checkpoint(tmp_path / name)["state_dict"] for name in ("cpu", "ddp", "fsdp2")}
    for name in ("ddp", "fsdp2"):
        assert_close(found[name], found["cpu"], rtol=1e-3, atol=1e-5)
    assert max(float(value.abs().max()) for name, value in found["cpu"].items() if "lora_B" in name) > 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU, and torch finds none")
@pytest.mark.parametrize("name", ["single_gpu", "ddp", "fsdp2"])
def test_gpu_files_train(tiny_lm: str, tmp_path: Path, name: str) -> None:
    """On one GPU, as written."""
    config = ("--config", str(FOLDER / f"{name}.yaml"), "--trainer.accelerator", "gpu", "--trainer.devices", "1")
    run_ranks([options(tiny_lm, tmp_path, *config, "--evaluation.at_start", "false")], size=1)
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["state_dict"].values())


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU, and torch finds none")
def test_offloaded_weights_train_on_a_gpu(tiny_lm: str, tmp_path: Path) -> None:
    """Weights and moments stay in the CPU's memory, and gradients there are clipped by norm."""
    config = ("--config", str(FOLDER / "fsdp2.yaml"), "--trainer.accelerator", "gpu", "--trainer.devices", "1")
    more = ("--trainer.strategy.cpu_offload", "true", "--trainer.gradient_clip_val", "1.0", "--model.lora", "null")
    run_ranks([options(tiny_lm, tmp_path, *config, *more)], size=1)
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["state_dict"].values())
