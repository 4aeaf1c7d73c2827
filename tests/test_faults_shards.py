"""Ranks killed while they write a folder of shards: the folder before is whole, and the half one is never taken."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fault_parts import MARKER, STANDING_SHARDS, Run, runs  # noqa: F401  # a fixture
from lit_agentrl.checkpoints.consolidate import consolidate
from lit_agentrl.checkpoints.whole import damage, newest_whole, num_iterations
from runs import options

SHARDS = '{"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": true}}'
KILLED = 30.0
"""Seconds until all of a run is gone, once one rank is."""
ITERATIONS = 5

# what stands still: moment, rank; whom SIGKILL reaches; the files of the folder that is not at its place by then
FAULTS = (
    ("before_shard", 0, 0, {"__1_0.distcp"}),  # the other rank's is written, and it waits for this one's
    ("before_shard", 1, 1, {"__0_0.distcp"}),
    ("after_shard", 0, 0, {"__0_0.distcp", "__1_0.distcp"}),
    ("after_shard", 1, 1, {"__0_0.distcp", "__1_0.distcp"}),
    ("before_rename", 0, 0, {"__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "manifest.json"}),
    ("before_rename", 0, 1, {"__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "manifest.json"}),
    ("after_rename", 0, 0, set()),  # at its place, but `last.ckpt` is not there yet
    ("after_rename", 0, 1, set()),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten starts of two processes
def test_two_ranks_killed_in_a_sharded_save(tiny_lm, tmp_path, runs):  # noqa: F811
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = (*STANDING_SHARDS, "--trainer.strategy", SHARDS, "--trainer.devices", "2", "--export.at_end", "false")
    more += ("--trainer.max_epochs", str(ITERATIONS), "--evaluation.every_n_epochs", "0")
    run = runs(options(tiny_lm, whole, *more))
    assert run.end(within=300)[0] == 0, run.output

    for number, (moment, rank, target, files) in enumerate(FAULTS):
        saved = number // 2  # the two faults of a moment hit the same iteration
        resume = ("--ckpt_path", "last") if number else ()
        half = broken / "checkpoints" / f"iteration_{saved + 1:06d}.ckpt.tmp"
        label = f"{moment} of rank {rank}: SIGKILL to {target}"
        after = saved + (moment == "after_rename")  # this iteration's own folder is there by then
        fault = f"{moment}:{rank}:{after}"
        run = runs(options(tiny_lm, broken, *more, *resume), FAULT=fault, FAULT_FOLDER=str(broken))
        run.until((broken / MARKER).exists)
        run.until(lambda half=half, files=files: names(half) >= files)
        assert names(half) == files, label
        kill(run, target, label)
        check_what_is_left(broken, saved, half, run, label)
        # rank 0 clears up where it lives on and the save is what failed
        assert half.exists() == (bool(files) and (target == 0 or moment == "before_rename")), label
        (broken / MARKER).unlink()

    run = runs(options(tiny_lm, broken, *more, "--ckpt_path", "last"))
    assert run.end(within=300)[0] == 0, run.output
    assert ".tmp" not in started_with(run)
    first, second = loaded(whole), loaded(broken)
    assert first["epoch"] == second["epoch"] == ITERATIONS - 1
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer_states"], first["optimizer_states"], rtol=0, atol=0)


def kill(run: Run, target: int, label: str) -> None:
    """End one rank; all of the run has to be gone soon, and to say so."""
    ranks = run.ranks()
    assert sorted(ranks) == [0, 1], label
    os.kill(ranks[target], signal.SIGKILL)
    code, seconds = run.end(within=KILLED)
    print(f"{label}: exit code {code}, {seconds:.1f} s")
    assert code == -9 if target == 0 else code > 0, f"{label}: {code}\n{run.output}"


def check_what_is_left(folder: Path, saved: int, half: Path, run: Run, label: str) -> None:
    """`last.ckpt` is the iteration before, whole; the half folder is nobody's checkpoint and outlives no start."""
    last = folder / "checkpoints" / "last.ckpt"
    assert last.resolve().name == f"iteration_{saved:06d}.ckpt", f"{label}\n{run.output}"
    assert damage(last) == "", label
    assert num_iterations(last) == saved + 1, label
    assert newest_whole(last.parent) != half, label
    assert run.output.count(f"--ckpt_path {last}") == 1, f"{label}\n{run.output}"
    assert f"Iteration {saved + 1} of {ITERATIONS} is saved" in run.output, f"{label}\n{run.output}"
    assert ".tmp" not in started_with(run), f"{label}\n{run.output}"


def started_with(run: Run) -> str:
    """What lay in the run's folder of checkpoints when it began to train."""
    return next(line for line in run.output.splitlines() if line.startswith("At the start:"))


def names(folder: Path) -> set[str]:
    """Of the files that are there and have their contents."""
    return {file.name for file in folder.glob("*") if file.stat().st_size} if folder.is_dir() else set()


def loaded(folder: Path) -> dict[str, Any]:
    """The last checkpoint, of one piece."""
    consolidate(folder / "checkpoints" / "last.ckpt", folder / "whole.ckpt")
    found: dict[str, Any] = torch.load(folder / "whole.ckpt", weights_only=True)
    return found
