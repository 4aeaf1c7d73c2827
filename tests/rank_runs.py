"""Command lines run on several gloo ranks: one start of the processes serves many runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import closing

import torch
import torch.multiprocessing as mp

FSDP2 = ("--trainer.strategy", '{"class_path": "FSDP2Strategy"}', "--trainer.devices", "2")


def free_port() -> int:
    """A port that nobody listens on just now."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_ranks(runs: Sequence[Sequence[str]], size: int = 2) -> None:
    """Run command lines one after another, each on all ranks, as if torchrun had started those.

    An error on one rank ends them all, and is raised here.
    """
    mp.spawn(_rank, (size, free_port(), [list(run) for run in runs]), nprocs=size)


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on one machine."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    return where | {name: str(value) for name, value in named.items()}


def _rank(rank: int, size: int, port: int, runs: list[list[str]]) -> None:
    from lit_agentrl.callbacks.ranks import LAUNCHER
    from lit_agentrl.cli import main

    os.environ |= rank_environment(rank, size, port)
    torch.set_num_threads(1)
    for run in runs:
        os.environ.pop(LAUNCHER, None)  # a run leaves it to the processes that it would have launched
        try:
            main(run)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{run}: exit code {stop.code}") from stop
