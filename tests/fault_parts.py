"""Runs that stand still at a chosen moment, to be killed in, and what is left of them afterwards.

`FAULT=rollout:1:0` lets rank 1 stand still in its first rollout after `iteration_000000.ckpt` was saved; it then writes
`<FAULT_FOLDER>/standing`. Moments: rollout, backward, checkpoint; of a folder of shards before_shard, after_shard,
before_rename, after_rename. Without the variable the same run goes through.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _FileSystemWriter

from lit_agentrl.callbacks import AtomicCheckpointIO
from lit_agentrl.callbacks import checkpoint as saving
from lit_agentrl.envs import EchoSuite
from lit_agentrl.files import replace_atomically
from lit_agentrl.types import Environment
from runs import ROOT

MARKER = "standing"


def stand_still(moment: str) -> None:
    """Ten minutes, where this is the moment and the rank that the test has chosen."""
    chosen, rank, after = (os.environ.get("FAULT", "") or "none:0:0").split(":")
    run = Path(os.environ.get("FAULT_FOLDER", "."))
    saved = run / "checkpoints" / f"iteration_{int(after):06d}.ckpt"
    if chosen == moment and rank == os.environ.get("LOCAL_RANK", "0") and saved.exists():
        (run / MARKER).write_text(str(os.getpid()))
        time.sleep(600)


class StandingSuite(EchoSuite):
    """The echo task, in which an episode may stand still."""

    def make(self, task: str) -> Environment:
        stand_still("rollout")
        return super().make(task)


class Standing(L.Callback):
    """Stands still inside the backward pass: a hook of the loss's gradient, called by autograd."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        loss.register_hook(lambda gradient: stand_still("backward"))


class StandingIO(AtomicCheckpointIO):
    """Stands still when a checkpoint's bytes are written and its name is not there yet."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        def write(file: Any) -> None:
            torch.save(checkpoint, file)
            file.flush()
            stand_still("checkpoint")

        replace_atomically(Path(path), write)


class StandingShards(L.Callback):
    """Stands still while the ranks write a folder of shards: around a rank's own shard, or around the renaming."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write, replace = _FileSystemWriter.write_data, saving._replace_folder

        def write_data(writer: Any, plan: Any, planner: Any) -> Any:
            stand_still("before_shard")
            future = write(writer, plan, planner)
            future.wait()
            stand_still("after_shard")
            return future

        def replace_folder(target: Path, new: Path) -> None:
            stand_still("before_rename")
            replace(target, new)
            stand_still("after_rename")

        _FileSystemWriter.write_data, saving._replace_folder = write_data, replace_folder  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        print("At the start:", *sorted(path.name for path in folder.glob("*")), flush=True)


STANDING = (
    "--data.environment",
    "fault_parts.StandingSuite",
    "--trainer.callbacks",
    '[{"class_path": "fault_parts.Standing"}]',
    "--trainer.plugins",
    '[{"class_path": "fault_parts.StandingIO"}]',
)
STANDING_SHARDS = ("--trainer.callbacks", '[{"class_path": "fault_parts.StandingShards"}]')


class Run:
    """The command line in a session of its own, and which processes that it started still live."""

    def __init__(self, arguments: list[str], log: Path, program: tuple[str, ...] = (), **environment: str) -> None:
        self.log = log
        self.name = f"FAULT_RUN={uuid.uuid4()}"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", *program, "-m", "lit_agentrl", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
                | environment
                | {"FAULT_RUN": self.name.partition("=")[2]},
                start_new_session=True,
                # whoever runs pytest in the background hands an ignored SIGINT down
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def ranks(self) -> dict[int, int]:
        """The process of each rank that lives, when Lightning has started them."""
        found = {}
        for process in self.living():
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            rank = next((int(word.split(b"=")[1]) for word in words if word.startswith(b"LOCAL_RANK=")), 0)
            if process == self.process.pid or rank:
                found[rank] = process
        return found

    def living(self) -> list[int]:
        """The processes with the run's mark, without those that only wait to be buried."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    is_marked = self.name.encode() in (folder / "environ").read_bytes()
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
                if is_marked and state != "Z":
                    found.append(int(folder.name))
        return found

    def until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for it; the run must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def end(self, within: float) -> tuple[int, float]:
        """The exit code, and the seconds until nobody of the session was left: at most `within`."""
        start = time.monotonic()
        while self.process.poll() is None or self.living():
            assert time.monotonic() < start + within, f"{self.living()} still live\n{self.output}"
            time.sleep(0.1)
        return self.process.returncode, time.monotonic() - start

    def kill(self) -> None:
        for process in self.living():
            os.kill(process, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; what is left of them at the end is killed."""
    started: list[Run] = []

    def begin(arguments: list[str], **more: Any) -> Run:
        started.append(Run(arguments, tmp_path / f"output-{len(started)}.txt", **more))
        return started[-1]

    yield begin
    for run in started:
        run.kill()
