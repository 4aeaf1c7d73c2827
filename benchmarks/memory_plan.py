"""Is the memory planner right? Predicted and measured peaks of training steps, over a small grid on a CPU.

    python benchmarks/memory_plan.py [--tokens 128 256 --cases "LoRA r 16" --output benchmarks/memory_plan.md]

A case is two optimiser steps on one micro-batch of a group (rows of 64 tokens, half of each the prompt). The prediction
is made before the weights are loaded. The error is that of what the step adds to the weights, which both count alike.
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lit_agentrl.doctor import rows
from lit_agentrl.doctor.passes import Passes
from lit_agentrl.doctor.plan import Setup, plan
from lit_agentrl.doctor.plan_measure import measured_step
from lit_agentrl.doctor.plan_report import Trial
from lit_agentrl.doctor.plan_rows import made_rows
from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.models.policy import Lora
from lit_agentrl.models.pretrained import read_config, resolve

MIB = 2**20
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "LoRA r 16": {"lora": Lora()},
    "LoRA r 16, checkpointing": {"lora": Lora(), "gradient_checkpointing": True},
    "LoRA r 16, bfloat16": {"lora": Lora(), "dtype": "bfloat16"},
}


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokens_given = " ".join(map(str, options.tokens))
    lines = [
        f"# Memory, predicted and measured: {options.pretrained}",
        "",
        f"torch {torch.__version__}, CPU; `python benchmarks/memory_plan.py --tokens {tokens_given}`.",
        "MiB; the error is that of what a step adds to the weights.",
        "",
        "| case | rows | tokens | weights | step predicted | measured | error | plan s | step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name, shared, tokens in itertools.product(options.cases, (False, True), options.tokens):
        lines.append(case(options.pretrained, name, shared, tokens))
        print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


def case(pretrained: str, name: str, shared: bool, tokens: int) -> str:
    """A line of the table."""
    config, given = read_config(pretrained, resolve(pretrained)), CASES[name]
    batch = rows.weighted(made_rows(tokens, 64, 32, 4, shared=shared, vocabulary=config.get_text_config().vocab_size))
    began = time.perf_counter()
    parts = plan(config, Setup(share_prefix=shared, device="cpu", rollouts=None, **given), batch).step
    planned = time.perf_counter() - began
    module = GRPOPlusPlusModule(pretrained=pretrained, share_prefix=shared, **given)
    module.configure_model()
    passes = Passes(module, nullcontext, batch)
    began = time.perf_counter()
    assert module.policy is not None
    measured = measured_step(passes, module.policy, range(len(batch.lengths)))
    took = time.perf_counter() - began
    trial = Trial(tokens, parts, parts.peak, measured, "")
    added, found = parts.peak - parts.weights, measured - parts.weights
    return (
        f"| {name} | {'shared' if shared else 'padded'} | {tokens} | {parts.weights / MIB:.0f} | {added / MIB:.1f} "
        f"| {found / MIB:.1f} | {trial.error:+.2%} | {planned:.1f} | {took:.1f} |"
    )


if __name__ == "__main__":
    main()
