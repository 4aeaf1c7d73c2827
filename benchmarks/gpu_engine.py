"""`HFEngine` against transformers' `generate` and continuous batching (`generate_batch`) on one GPU.

Run with CUDA: `python benchmarks/gpu_engine.py [--repeats 3]`. The table goes to `benchmarks/gpu_engine.md`.
`--device cpu --quick` runs the same script on a tiny model, to test it (without continuous batching: it needs a GPU).

A random policy in the shape of Qwen3-0.6B in bfloat16, 32 sequences of 64 new tokens after prompts of 200 tokens,
greedy, no end token: 32 different prompts, and one prompt 32 times. All ways run in this process, in turn; the first
round warms up. The engine is synced anew before each call, as after an optimiser step, so it has nothing cached.
Continuous batching is timed twice: as one call, which sets its manager up, and with a manager that is kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prefix import model_config
from prefix_gpu import SHAPES, qwen3
from prefix_sides import random_qwen3
from prefix_tables import footer, markdown
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import SamplingParams

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
    ways = {"HFEngine": by_engine(lm, args.new), "generate": by_generate(lm, args.new)}
    if args.device == "cuda":
        ways |= {"continuous batching": by_batching(lm, args.new, False)}
        ways |= {"continuous batching, kept": by_batching(lm, args.new, True)}
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


def by_engine(lm: PreTrainedModel, new: int) -> Way:
    """Ours."""
    engine = HFEngine(stop_token_ids=[])

    def run(prompts: list[list[int]]) -> list[list[int]]:
        engine.sync(lm)
        return [each.token_ids for each in engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=new))]

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


def by_batching(lm: PreTrainedModel, new: int, kept: bool) -> Way:
    """Transformers' continuous batching over a paged cache."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # by default it takes nearly all the memory there is, and fails where something else holds a part
    batching = ContinuousBatchingConfig(max_memory_percent=0.5)

    def run(prompts: list[list[int]]) -> list[list[int]]:
        before = lm.config._attn_implementation
        try:
            done = lm.generate_batch(
                inputs=prompts,
                generation_config=config,
                continuous_batching_config=batching,
                persistent_manager=kept,
            )
        finally:
            if lm.config._attn_implementation != before:
                lm.set_attn_implementation(before)
        place = sorted(done, key=lambda name: [int(part) for part in name.split("_") if part.isdigit()])
        return [list(done[name].generated_tokens) for name in place]

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
