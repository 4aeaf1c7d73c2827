"""What sharing prefixes saves on a GPU: forward, loss and backward against padded rows and unshared packing.

Run with CUDA: `python benchmarks/prefix_gpu.py [--size 0.6b] [--cases A,8K] [--repeats 10] [--checkpoint]`. The table
goes to `benchmarks/prefix_gpu_<size>.md`. `--device cpu --quick` runs the same script on a tiny model with a dense
mask, to test it; without CUDA anything else ends with exit code 2.

Qwen3 with random weights in the shape of its 0.6B or 1.7B, bfloat16, head tied and on target tokens only. Sides:

- padded: the plain causal forward without a mask, which SDPA runs on its flash kernel, at the fastest of 1, 2, 4, 8 and
  all rows at a time;
- unshared packing: all rows behind one another, each attending to itself (FlexAttention);
- ours: `PrefixGroupedModel` with FlexAttention, all rows in one pack, padded to a multiple of 128 tokens.

A step is timed by CUDA events from packing on the host to the last gradient; three steps of every shape warm up, then
sides take turns. What does not fit the memory is said so. Graphs counts what torch.compile compiled for the case: more
than in a case before it means that new sizes made it compile again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prefix import model_config
from prefix_batches import CASES, Batch, group, padded_work, tree_work, unshared_work
from prefix_sides import Scorer, loss_and_gradients, padded, random_qwen3, shared, unshared_packing
from prefix_tables import footer, markdown
from torch import Tensor, nn
from transformers import Qwen3Config

from lit_agentrl.models.activations import recompute_activations

HERE = Path(__file__).parent
SHAPES = {"0.6b": (1024, 3072, 28, 16, 8), "1.7b": (2048, 6144, 28, 16, 8)}
"""Hidden size, MLP size, layers, heads, key heads; heads are 128 wide."""
GPU_CASES: dict[str, tuple[str, Callable[[int, int], Batch]]] = CASES | {
    "4K": ("group 4 x (4096 + 512)", lambda n, vocab: group(4, 4096 // n, 512 // n, vocab)),
    "8K": ("group 4 x (8192 + 512)", lambda n, vocab: group(4, 8192 // n, 512 // n, vocab)),
}
WARM_UP = 3  # steps of every shape; 1 in a test of the script


@dataclass
class Timing:
    """The steps of one side."""

    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0
    """Peak GiB allocated beyond the weights."""
    logprobs: Tensor | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds; infinite for a side that failed."""
        return statistics.median(self.seconds) if self.seconds else float("inf")


def main() -> None:
    """Measure, print the table and write it."""
    args = arguments()
    torch.manual_seed(0)
    config = model_config(quick=True) if args.quick else qwen3(args.size)
    lm = random_qwen3(config, torch.float32 if args.quick else torch.bfloat16, args.device)
    if args.checkpoint:
        recompute_activations(lm)
    output = args.output or (None if args.quick else HERE / f"prefix_gpu_{args.size}.md")
    rows: list[list[str]] = []
    for name in args.cases.split(","):
        rows.append(Case(name, args, config, lm).row())
        print(" | ".join(rows[-1]), flush=True)
        if output:
            output.write_text(report(rows, args))  # what there is, should a later case not end
    print(report(rows, args))


def arguments() -> argparse.Namespace:
    """The command line; ends the process where there is nothing to run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(GPU_CASES), help="names, with commas between")
    parser.add_argument("--size", choices=SHAPES, default="0.6b")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and small shapes, nothing written by default"
    )
    parser.add_argument("--output", type=Path, help="where the table goes")
    args = parser.parse_args()
    if unknown := sorted(set(args.cases.split(",")) - set(GPU_CASES)):
        parser.error(f"--cases: unknown {unknown}; there are {', '.join(GPU_CASES)}.")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu is for a test of the script: add --quick, or run benchmarks/prefix.py.")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU and found none. On CPU, run benchmarks/prefix.py.", file=sys.stderr)
        raise SystemExit(2)
    return args


def qwen3(size: str) -> Qwen3Config:
    """The configuration of a published Qwen3."""
    hidden, mlp, layers, heads, key_heads = SHAPES[size]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


class Case:
    """One batch, all sides."""

    def __init__(self, name: str, args: argparse.Namespace, config: Qwen3Config, lm: nn.Module) -> None:
        self.name, self.args, self.config, self.lm = name, args, config, lm
        self.what, make = GPU_CASES[name]
        self.batch = make(16 if args.quick else 1, config.vocab_size).to(args.device)
        self.backend = "flex" if args.device == "cuda" else "dense"
        self.warm_up = 1 if args.quick else WARM_UP

    def row(self) -> list[str]:
        """The table's row."""
        graphs = num_graphs()
        best, trials = self.best_micro_batch()
        parts = {
            "padded": (padded(self.lm), self.batch.micro_batches(best)),
            "unshared": (unshared_packing(self.lm, self.backend), [self.batch]),
            "ours": (shared(self.lm, self.backend), [self.batch]),
        }
        timings = {side: Timing() for side in parts}
        for repeat in range(self.warm_up + self.args.repeats):
            for side, (scorer, micro_batches) in parts.items():
                self.step(timings[side], scorer, micro_batches, counts=repeat >= self.warm_up)
        exact = self.exact_logprobs()
        config, work = self.config, tree_work(self.batch.to("cpu"))
        ideal = padded_work(self.batch, best).flops(config) / work.flops(config)
        ideal_packing = unshared_work(self.batch).flops(config) / work.flops(config)
        ours = timings["ours"]
        speed_up = timings["padded"].median / ours.median
        whole = trials[len(self.batch)]
        return [
            f"{self.name}: {self.what}",
            f"{self.batch.token_ids.numel():,} to {work.tokens:,}",
            f"{shown(timings['padded'])} [{best}]",
            shown(timings["unshared"]),
            shown(ours),
            f"**{speed_up:.2f}x**",
            f"{ideal:.2f} ({speed_up / ideal:.0%})",
            f"{timings['unshared'].median / ours.median:.2f}x (ideal {ideal_packing:.2f})",
            whole.failure or f"{whole.memory:.2f}",
            *(f"{timings[side].memory:.2f}" for side in ("padded", "unshared", "ours")),
            *(error(timings[side].logprobs, exact) for side in ("padded", "ours")),
            str(num_graphs() - graphs),
        ]

    def best_micro_batch(self) -> tuple[int, dict[int, Timing]]:
        """How many rows at a time are fastest on the padded side, and all that was tried."""
        trials = {size: Timing() for size in (1, 2, 4, 8, len(self.batch)) if size <= len(self.batch)}
        for size, timing in trials.items():
            for repeat in range(2 * self.warm_up):
                self.step(timing, padded(self.lm), self.batch.micro_batches(size), counts=repeat >= self.warm_up)
        return min(trials, key=lambda size: trials[size].median), trials

    def step(self, timing: Timing, scorer: Scorer, parts: list[Batch], counts: bool) -> None:
        """One forward, loss and backward; a side that ran out of memory is not tried again."""
        if timing.failure:
            return
        self.lm.zero_grad(set_to_none=True)
        clock = Clock(self.args.device)
        try:
            timing.logprobs = loss_and_gradients(scorer, parts, self.batch)
        except torch.cuda.OutOfMemoryError:
            timing.failure = "out of memory"
            timing.seconds.clear()
        else:
            seconds, memory = clock.stop()
            if counts:
                timing.seconds.append(seconds)
                timing.memory = max(timing.memory, memory)
        if timing.failure:
            self.lm.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def exact_logprobs(self) -> Tensor:
        """Log-probabilities of the same weights in float32 (float64 where they are float32), row by row."""
        self.lm.zero_grad(set_to_none=True)
        wider = torch.float64 if self.lm.dtype == torch.float32 else torch.float32
        scorer = padded(copy.deepcopy(self.lm).to(wider))
        logprobs = torch.zeros(self.batch.token_ids.shape, dtype=torch.float64)
        with torch.no_grad():
            for part in self.batch.micro_batches(1):
                logprobs[part.rows.cpu(), : part.token_ids.shape[1]] = scorer(part).double().cpu()
        return logprobs


class Clock:
    """Seconds and GiB from here to `stop`."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            self.events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.began = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Seconds, and peak GiB allocated beyond what was there before; 0 on CPU."""
        if not self.on_gpu:
            return time.perf_counter() - self.began, 0.0
        self.events[1].record()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - self.base) / 2**30
        return self.events[0].elapsed_time(self.events[1]) / 1e3, memory


def num_graphs() -> int:
    """Graphs that torch.compile has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def shown(timing: Timing) -> str:
    """Milliseconds: the median, the least and the most."""
    if timing.failure:
        return timing.failure
    return f"{1e3 * timing.median:.1f} ({1e3 * min(timing.seconds):.1f}-{1e3 * max(timing.seconds):.1f})"


def error(logprobs: Tensor | None, exact: Tensor) -> str:
    """The mean and the largest difference of log-probabilities."""
    if logprobs is None:
        return "-"
    difference = (logprobs - exact).abs()
    return f"{float(difference.sum() / (exact != 0).sum()):.1e} / {float(difference.max()):.1e}"


def report(rows: list[list[str]], args: argparse.Namespace) -> str:
    """The table with its machine."""
    header = (
        "case", "tokens", "padded, ms [rows at a time]", "unshared packing, ms", "ours, ms", "over padded",
        "FLOP ideal (share reached)", "over packing", "GiB: padded, all rows", "padded, its best", "unshared packing",
        "ours", "log-prob error, padded", "log-prob error, ours", "graphs",
    )  # fmt: skip
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    lines = [
        f"# Shared prefixes on a GPU, Qwen3-{args.size} in bfloat16" if not args.quick else "# A test of the script",
        "",
        f"`python benchmarks/prefix_gpu.py --size {args.size}{' --checkpoint' if args.checkpoint else ''}`, which says",
        f"what the sides are. Medians of {args.repeats} steps (in brackets, the least and the most). Errors are the",
        "mean and the largest difference of a log-probability from a float32 forward of the same weights. The",
        "integration of Prefix Grouper in verl names 1.70x for the update of Qwen3-4B at prompts of 8K and n = 4 (4 x",
        "H800, length of the answers not said), to be held against case 8K.",
        "",
        *markdown(header, rows),
        "",
        f"{device}. {footer(torch.get_num_threads())}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
