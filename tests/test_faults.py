"""Real processes of a run that are killed or told to end: all end soon, say how to go on, and nothing is lost.

The faults of one strategy hit one run after the other, each resumed from what the one before left: a start of two
processes costs seconds, and a run has to bear several faults in a row anyway.
"""

import os
import signal
import time

import pytest
import torch

from fault_parts import MARKER, STANDING, runs  # noqa: F401  # a fixture
from runs import checkpoint, options

DDP = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
FSDP2 = ("--trainer.strategy", '{"class_path": "FSDP2Strategy"}', "--trainer.devices", "2")

KILLED = 30.0
"""Seconds until all of a run is gone, once one rank is; measured in docs/faults.md."""
TOLD = 30.0

# (what stands still: moment, rank), (whom the signal reaches, which)
FAULTS = {
    "ddp": (
        (("rollout", 1), (1, signal.SIGKILL)),  # rank 0 waits for it
        (("backward", 1), (0, signal.SIGKILL)),  # in the reduction of the gradients
        (("checkpoint", 0), (1, signal.SIGKILL)),
        (("rollout", 1), (0, signal.SIGTERM)),
        (("backward", 1), ("all", signal.SIGTERM)),
        (("rollout", 0), ("all", signal.SIGINT)),
    ),
    "fsdp2": (
        (("rollout", 1), (0, signal.SIGKILL)),
        (("backward", 0), (1, signal.SIGKILL)),
        (("checkpoint", 0), (0, signal.SIGKILL)),
        (("backward", 1), (0, signal.SIGTERM)),
        (("rollout", 0), ("all", signal.SIGTERM)),
        (("backward", 1), ("all", signal.SIGINT)),
    ),
}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
ITERATIONS = "7"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), [("ddp", DDP), ("fsdp2", FSDP2)])
def test_two_ranks_killed_and_told_to_end(tiny_lm, tmp_path, runs, name, strategy):  # noqa: F811
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = (*STANDING, *strategy, "--trainer.max_epochs", ITERATIONS, "--evaluation.every_n_epochs", "0")
    run = runs(options(tiny_lm, whole, *more))
    assert run.end(within=300)[0] == 0, run.output

    for saved, ((moment, rank), (target, sent)) in enumerate(FAULTS[name]):
        label = f"{name}, {moment} of rank {rank}: {sent.name} to {target}"
        resume = ("--ckpt_path", "last") if saved else ()
        fault = f"{moment}:{rank}:{saved}"
        run = runs(options(tiny_lm, broken, *more, *resume), FAULT=fault, FAULT_FOLDER=str(broken))
        run.until((broken / MARKER).exists)
        time.sleep(0.3)  # the other rank comes to wait for the one that stands still
        ranks = run.ranks()
        assert sorted(ranks) == [0, 1]
        for process in ranks.values() if target == "all" else [ranks[target]]:
            os.kill(process, sent)
        code, seconds = run.end(within=KILLED if sent is signal.SIGKILL else TOLD)
        print(f"{label}: exit code {code}, {seconds:.1f} s")
        expected = CODES.get(sent) or (-9 if target == 0 else None)
        assert code == expected if expected else code > 0, f"{label}: {code}\n{run.output}"
        last = broken / "checkpoints" / "last.ckpt"
        assert run.output.count(f"--ckpt_path {last}") == 1, f"{label}\n{run.output}"
        assert f"Iteration {saved + 1} of {ITERATIONS} is saved" in run.output, f"{label}\n{run.output}"
        assert checkpoint(broken)["epoch"] == saved
        (broken / MARKER).unlink()

    run = runs(options(tiny_lm, broken, *more, "--ckpt_path", "last"))
    assert run.end(within=300)[0] == 0, run.output
    first, second = checkpoint(whole), checkpoint(broken)
    assert first["epoch"] == second["epoch"] == int(ITERATIONS) - 1
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer_states"], first["optimizer_states"], rtol=0, atol=0)


@pytest.mark.slow
def test_ranks_end_when_torchruns_agent_is_killed(tiny_lm, tmp_path, runs):  # noqa: F811
    """The agent alone: its workers are nobody's children then."""
    folder = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    arguments = options(tiny_lm, folder, *STANDING, *DDP, "--evaluation.every_n_epochs", "0")
    run = runs(arguments, program=torchrun, FAULT="rollout:1:0", FAULT_FOLDER=str(folder))
    run.until((folder / MARKER).exists)
    time.sleep(0.3)
    assert len(run.living()) == 3
    run.process.kill()
    code, seconds = run.end(within=KILLED)
    print(f"torchrun: {code}, {seconds:.1f} s")
    assert run.output.count(f"--ckpt_path {folder}/checkpoints/last.ckpt") == 1, run.output
    assert f"process {run.process.pid}, which started this one (rank 0 here), is gone" in run.output
