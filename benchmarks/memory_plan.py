"""Is the memory planner right? Predicted and measured peaks of training steps, over a small grid on a CPU.

    python benchmarks/memory_plan.py [--tokens 128 256 --cases "LoRA r 16" --output benchmarks/memory_plan.md]
    python benchmarks/memory_plan.py --ranks 2 --tokens 128 --output benchmarks/memory_plan_ranks.md

A case is two optimiser steps on one micro-batch of a group (rows of 64 tokens, half of each the prompt). The prediction
is made before the weights are loaded. The error is that of what the step adds to the weights, which both count alike.
With `--ranks` FSDP2 shards over so many gloo ranks on this machine, and the numbers are those of one of them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from lit_agentrl.doctor import rows
from lit_agentrl.doctor.passes import Passes
from lit_agentrl.doctor.plan import MemoryPlan, Ranks, Setup, plan
from lit_agentrl.doctor.plan_measure import measured_step
from lit_agentrl.doctor.plan_report import Trial
from lit_agentrl.doctor.plan_rows import made_rows
from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.models.policy import Lora
from lit_agentrl.models.pretrained import read_config, resolve
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.types import TrainBatch

MIB = 2**20
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "full, bf16-mixed": {"precision": "bf16-mixed"},
    "LoRA r 16": {"lora": Lora()},
    "LoRA r 16, checkpointing": {"lora": Lora(), "gradient_checkpointing": True},
    "LoRA r 16, bfloat16": {"lora": Lora(), "dtype": "bfloat16"},
}
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", layers stay gathered": {"reshard_after_forward": False},
    ", cpu_offload": {"cpu_offload": True},
}


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ranks", type=int, default=0, help="gloo ranks that FSDP2 shards over; 0 does not shard")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokens_given = " ".join(map(str, options.tokens)) + (f" --ranks {options.ranks}" if options.ranks else "")
    lines = [
        f"# Memory, predicted and measured: {options.pretrained}",
        "",
        f"torch {torch.__version__}, CPU; `python benchmarks/memory_plan.py --tokens {tokens_given}`.",
        "MiB; the error is that of what a step adds to the weights.",
        "",
        f"| case | {'ranks' if options.ranks else 'rows'} | tokens | weights | step predicted | measured | error "
        "| plan s | step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    if options.ranks:
        grid = list(itertools.product(options.cases, WAYS, options.tokens))
        given = [(CASES[name], WAYS[way], tokens) for name, way, tokens in grid]
        names = [name + way for name, way, _ in grid]
        lines += rank_lines(options.pretrained, names, given, options.ranks)
    else:
        for name, shared, tokens in itertools.product(options.cases, (False, True), options.tokens):
            lines.append(case(options.pretrained, name, shared, tokens))
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


def case(pretrained: str, name: str, shared: bool, tokens: int) -> str:
    """A line of the table."""
    config, given = read_config(pretrained, resolve(pretrained)), CASES[name]
    batch = made(pretrained, tokens, shared=shared)
    began = time.perf_counter()
    parts = plan(config, Setup(share_prefix=shared, device="cpu", rollouts=None, **given), batch).step
    planned = time.perf_counter() - began
    passes = step_of(pretrained, batch, share_prefix=shared, **given)
    module = passes.module
    began = time.perf_counter()
    assert module.policy is not None
    measured = measured_step(passes, module.policy, range(len(batch.lengths)))
    took = time.perf_counter() - began
    trial = Trial(tokens, parts, parts.peak, measured, "")
    return line(name, "shared" if shared else "padded", trial, planned, took)


def line(name: str, kind: object, trial: Trial, planned: float, took: float) -> str:
    """A trial as a line of the table."""
    assert trial.measured is not None
    weights = trial.parts.weights
    added, found = trial.predicted - weights, trial.measured - weights
    return (
        f"| {name} | {kind} | {trial.tokens} | {weights / MIB:.1f} | {added / MIB:.1f} | {found / MIB:.1f} "
        f"| {trial.error:+.2%} | {planned:.1f} | {took:.1f} |"
    )


def step_of(pretrained: str, batch: TrainBatch, precision: str = "32-true", **given: Any) -> Passes:
    """A policy in a module, and what runs rows through it."""
    module = GRPOPlusPlusModule(pretrained=pretrained, **given)
    module.configure_model()
    cast = nullcontext if precision == "32-true" else lambda: torch.autocast("cpu", torch.bfloat16)
    return Passes(module, cast, batch)


def made(pretrained: str, tokens: int, *, shared: bool) -> TrainBatch:
    """A micro-batch."""
    vocabulary = read_config(pretrained, resolve(pretrained)).get_text_config().vocab_size
    return rows.weighted(made_rows(tokens, 64, 32, 4, shared=shared, vocabulary=vocabulary))


Given = tuple[dict[str, Any], dict[str, Any], int]
"""Options of the module, those of the sharding, and tokens of a micro-batch."""


def rank_lines(pretrained: str, names: list[str], given: list[Given], size: int) -> list[str]:
    """Lines of cases that are measured on ranks: predicted here, then measured by one start of the processes."""
    trials = rank_trials(pretrained, given, size)
    lines = [line(name, size, *trial) for name, trial in zip(names, trials, strict=True)]
    print("\n".join(lines), flush=True)
    return lines


def rank_trials(pretrained: str, given: list[Given], size: int) -> list[tuple[Trial, float, float]]:
    """Of each case the first rank's trial, and how many seconds the plan and the step took.

    On a CPU what is offloaded lies where the rest does: both memories are counted as one, and measured so.
    """
    config = read_config(pretrained, resolve(pretrained))
    plans: dict[str, MemoryPlan] = {}
    predicted = []
    for options, ways, tokens in given:
        began = time.perf_counter()
        if (key := f"{options} {tokens}") not in plans:
            setup = Setup(share_prefix=False, device="cpu", rollouts=None, **options)
            plans[key] = plan(config, setup, made(pretrained, tokens, shared=False))
        ranks = Ranks(size, **ways)
        predicted.append((plans[key].on_rank(ranks), time.perf_counter() - began))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, folder, pretrained, given), nprocs=size)
        measured = json.loads((Path(folder) / "measured.json").read_text())
    return [
        (Trial(case[2], parts, parts.peak, found, ""), planned, took)
        for case, (parts, planned), (found, took) in zip(given, predicted, measured, strict=True)
    ]


def _rank(rank: int, size: int, folder: str, pretrained: str, given: list[Given]) -> None:
    """Measure all cases on one of the ranks; the first writes down what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    found = []
    for options, ways, tokens in given:
        batch = made(pretrained, tokens, shared=False)
        passes = step_of(pretrained, batch, share_prefix=False, **options)
        policy: Any = passes.module.policy
        policy.is_checked = True  # its check runs before it is sharded, or not at all
        shard(policy, mesh, Sharding(**ways), options.get("precision", "32-true"))
        began = time.perf_counter()
        peak = measured_step(passes, policy, range(len(batch.lengths)))
        found.append((peak, time.perf_counter() - began))
        if rank == 0:
            print(f"{options} {ways}: {peak / MIB:.1f} MiB", flush=True)
        del passes, policy
        gc.collect()  # sharded modules refer to themselves
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
