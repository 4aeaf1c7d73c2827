"""`HFEngine` against transformers' `generate` and `ContinuousBatchingEngine` on one GPU.

Run with CUDA: `python benchmarks/gpu_engine.py [--repeats 3]`. The table goes to `benchmarks/gpu_engine.md`.
`--device cpu --quick` runs the same script on a tiny model, to test it.

A random policy in the shape of Qwen3-0.6B in bfloat16, 32 sequences of 64 new tokens after prompts of 200 tokens,
greedy, no end token: 32 different prompts, and one prompt 32 times. All ways run in this process, in turn; the first
round warms up. Engines are synced anew before each call, as after an optimiser step, so they have nothing cached, and
closed after it. The paged engine runs as it decides itself, and with CUDA graphs; its time includes what it sets up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prefix import model_config
from prefix_gpu import SHAPES, qwen3
from prefix_sides import random_qwen3
from prefix_tables import footer, markdown
from transformers import PreTrainedModel

from lit_agentrl.rollouts import ContinuousBatchingEngine, HFEngine
from lit_agentrl.types import Engine, SamplingParams

HERE = Path(__file__).parent
Way = Callable[[list[list[int]]], list[list[int]]]


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--size", choices=SHAPES, default="0.6b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written by default")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU and found none.", file=sys.stderr)
        raise SystemExit(2)
    config = model_config(quick=True) if args.quick else qwen3(args.size)
    lm = random_qwen3(config, torch.float32 if args.quick else torch.bfloat16, args.device)
    lm.generation_config.eos_token_id = None
    rows = []
    for name in ("different", "shared"):
        rows += case(name, lm, args)
    text = report(rows, args)
    print(text)
    output = args.output or (None if args.quick else HERE / "gpu_engine.md")
    if output:
        output.write_text(text)


def case(name: str, lm: PreTrainedModel, args: argparse.Namespace) -> list[list[str]]:
    """The rows of one kind of prompts; a way that fails says so in its row."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, lm.config.vocab_size, (args.batch, args.prompt), generator=generator)
    if name == "shared":
        prompts = prompts[:1].expand(args.batch, -1)
    inputs = prompts.tolist()
    paged: dict[str, Any] = {"stop_token_ids": [], "max_cached_tokens": room(args)}
    ways = {
        "HFEngine": by_engine(HFEngine(stop_token_ids=[]), lm, args.new),
        "generate": by_generate(lm, args.new),
        "ContinuousBatchingEngine": by_engine(ContinuousBatchingEngine(**paged), lm, args.new),
    }
    if args.device == "cuda":
        graphs = ContinuousBatchingEngine(**paged, use_cuda_graphs=True)
        ways["ContinuousBatchingEngine, CUDA graphs"] = by_engine(graphs, lm, args.new)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, list[list[int]]] = {}
    failures: dict[str, str] = {}
    for repeat in range(args.repeats + 1):
        for way, run in ways.items():
            if way in failures:
                continue
            wait(args.device)
            began = time.perf_counter()
            try:
                tokens[way] = run(inputs)
            except Exception as error:  # another's code: its failure is a result, and the others go on
                failures[way] = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            wait(args.device)
            if [len(of) for of in tokens[way]] != [args.new] * args.batch:  # its loop logs what went wrong, and returns
                failures[way] = f"it gave {sum(map(len, tokens[way]))} of {args.new * args.batch} tokens"
            elif repeat:
                seconds[way].append(time.perf_counter() - began)
        print(name, repeat, {way: round(of[-1], 3) for way, of in seconds.items() if of}, flush=True)
    base = statistics.median(seconds["HFEngine"])
    rows = []
    for way, of in seconds.items():
        if not of:
            rows.append([name, way, failures.get(way, "-"), "", "", ""])
            continue
        middle = statistics.median(of)
        same = sum(a == b for a, b in zip(tokens[way], tokens["generate"], strict=True))
        each = f"{middle:.3f} ({min(of):.3f}-{max(of):.3f})"
        rate = args.batch * args.new / middle
        rows.append([name, way, each, f"{rate:.0f}", f"{middle / base:.2f}x", f"{same} of {args.batch}"])
    return rows


def room(args: argparse.Namespace) -> int:
    """Tokens that the paged cache needs, in whole pages of 256 a sequence, and one page more."""
    return 256 * (args.batch * -(-(args.prompt + args.new) // 256) + 1)


def by_engine(engine: Engine, lm: PreTrainedModel, new: int) -> Way:
    """One of ours."""

    def run(prompts: list[list[int]]) -> list[list[int]]:
        engine.sync(lm)
        tokens = [
            each.token_ids for each in engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=new))
        ]
        engine.close()  # its memory is the next way's
        return tokens

    return run


def by_generate(lm: PreTrainedModel, new: int) -> Way:
    """Transformers' plain batch, with its default cache."""

    def run(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=lm.device)
        mask = torch.ones_like(ids)
        output = lm.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
        found: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return found

    return run


def wait(device: str) -> None:
    """Until the GPU has ended."""
    if device == "cuda":
        torch.cuda.synchronize()


def report(rows: list[list[str]], args: argparse.Namespace) -> str:
    """The table with its machine."""
    header = ("prompts", "way", "seconds (least-most)", "new tokens/s", "time over HFEngine's", "equal to generate's")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    lines = [
        "# Engines on one GPU" if not args.quick else "# A test of the script",
        "",
        "`python benchmarks/gpu_engine.py`, which says what is measured: random weights in the shape of",
        f"Qwen3-{args.size} in bfloat16, {args.batch} sequences, prompts of {args.prompt} tokens, {args.new} new ones",
        f"each, medians of {args.repeats}. The last column counts sequences whose every token is that of `generate`:",
        "random weights give many near-ties, which rounding in 16 bits decides.",
        "",
        *markdown(header, rows),
        "",
        f"{device}. {footer(torch.get_num_threads())}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
