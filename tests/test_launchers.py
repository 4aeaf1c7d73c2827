"""However its processes are started, a run of two ranks trains as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lit_agentrl.cli import main
from rank_runs import FSDP2, free_port
from runs import ROOT, checkpoint, options, run_alone

SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5", "--data.num_prompts", "3")
NODES = ("--trainer.strategy", "fsdp2", "--trainer.num_nodes", "2", "--trainer.devices", "1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that one process ends with."""
    run = tmp_path_factory.mktemp("alone")
    main(options(tiny_lm, run, *SGD))
    return dict(checkpoint(run)["state_dict"])


def run_together(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> None:
    """Processes side by side, as nodes are; all have to end well."""
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output


def assert_trained_alike(run: Path, alone: dict[str, torch.Tensor]) -> None:
    found = checkpoint(run)["state_dict"]
    assert_close(found, alone, rtol=1e-3, atol=1e-5)
    assert max(float(value.abs().max()) for name, value in alone.items() if "lora_B" in name) > 1e-3
    assert (run / "export" / "model.safetensors").is_file()


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "lit_agentrl"]


def test_lightnings_own(tiny_lm: str, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    """The first process starts the second."""
    code, output = run_alone(options(tiny_lm, tmp_path, *SGD, *FSDP2))
    assert code == 0, output
    assert_trained_alike(tmp_path, alone)


def test_torchrun(tiny_lm: str, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    command = torchrun("--nproc_per_node", "2", "--master_port", str(free_port()))
    run_together([[*command, *options(tiny_lm, tmp_path, *SGD, *FSDP2)]], [{}])
    assert_trained_alike(tmp_path, alone)


def test_torchrun_on_two_nodes(tiny_lm: str, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    """Two agents on this machine, a rank each."""
    where = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    given = options(tiny_lm, tmp_path, *SGD, *NODES)
    run_together([[*torchrun(*where, "--node_rank", str(node)), *given] for node in (0, 1)], [{}, {}])
    assert_trained_alike(tmp_path, alone)


def test_slurm_on_two_nodes(tiny_lm: str, tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    """What srun tells the tasks of a job, told by hand."""
    job = {
        "SLURM_JOB_ID": str(free_port()),  # Lightning makes the port of it
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    tasks = [job | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in (0, 1)]
    given = [sys.executable, "-m", "lit_agentrl", *options(tiny_lm, tmp_path, *SGD, *NODES)]
    run_together([given, given], tasks)
    assert_trained_alike(tmp_path, alone)
