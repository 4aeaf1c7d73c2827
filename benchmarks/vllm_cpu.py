"""How far `HFEngine` is behind vLLM on CPU, both sampling from the same SmolLM2-135M in one process and in turn.

    .venv-vllm/bin/python benchmarks/vllm_cpu.py [--dtype float32] [--threads 1] [--repeats 3] [--batch 32] [--new 64]

Every repeat has fresh prompts: one for all of the batch (a group of GRPO), then as many as the batch is large. Prefix
caching is on in both. Beside the times: how far each engine's log-probabilities are from a plain forward of the same
weights in float32. Ends with 2 where vLLM is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from lit_agentrl.models.policy import load_policy, load_tokenizer
from lit_agentrl.rollouts import HFEngine, VLLMEngine
from lit_agentrl.types import Completion, Engine, SamplingParams

Times = dict[tuple[str, str], list[tuple[float, float]]]


def prompts(kind: str, repeat: int, batch: int, length: int) -> list[list[int]]:
    """Random token ids: with real text the decoded lengths would differ, not the work of a token."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    num = 1 if kind == "shared" else batch
    rows = torch.randint(300, 49_000, (num, length), generator=generator).tolist()
    return rows * (batch // num)


def timed(engine: Engine, contexts: list[list[int]], params: SamplingParams) -> tuple[float, float, list[Completion]]:
    """Seconds on the clock, seconds of this process's cores, and what came."""
    start, cpu_start = time.perf_counter(), time.process_time()
    found = engine.generate(contexts, params, range(len(contexts)))
    seconds = time.perf_counter() - start, time.process_time() - cpu_start
    assert all(len(completion.token_ids) == params.max_new_tokens for completion in found)
    return *seconds, found


@torch.no_grad()
def errors(lm: torch.nn.Module, contexts: Sequence[list[int]], found: Sequence[Completion]) -> torch.Tensor:
    """|log-probability - a plain forward's|, [N], of some completions."""
    differences = []
    for context, completion in zip(contexts, found, strict=True):
        ids = torch.tensor([context + completion.token_ids])
        logits = lm(input_ids=ids).logits[0, len(context) - 1 : -1].float()
        right = logits.log_softmax(-1).gather(1, ids[0, len(context) :, None])[:, 0]
        differences.append((right - torch.tensor(completion.logprobs)).abs())
    return torch.cat(differences)


def report(args: argparse.Namespace, times: Times, gaps: dict[str, torch.Tensor]) -> None:
    num_tokens = args.batch * args.new
    print(
        f"\n{args.dtype}, batch {args.batch}, prompt {args.prompt}, {args.new} new tokens, {args.threads} thread(s)\n"
    )
    print("| prompts | engine | seconds (each repeat) | core seconds (median) | new tokens a core second | a second |")
    print("|---|---|---|---|---|---|")
    for (kind, name), cell in times.items():
        wall, cores = (statistics.median(values) for values in zip(*cell, strict=True))
        each = ", ".join(f"{seconds:.1f}" for seconds, _ in cell)
        print(f"| {kind} | {name} | {each} | {cores:.1f} | {num_tokens / cores:.0f} | {num_tokens / wall:.0f} |")
    for kind in ("shared", "different"):
        ratios = [
            [vllm[i] / ours[i] for ours, vllm in zip(times[kind, "HFEngine"], times[kind, "VLLMEngine"], strict=True)]
            for i in (1, 0)
        ]
        by_core, by_clock = (", ".join(f"{ratio:.0%}" for ratio in each) for each in ratios)
        print(f"\n{kind}: HFEngine has {by_core} of vLLM's tokens a core second ({by_clock} a second)")
    for name, gap in gaps.items():
        print(f"\n{name}: log-probabilities off by {gap.mean():.2g} on average, {gap.max():.2g} at most ({len(gap)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    for name, value in {"threads": 1, "repeats": 3, "batch": 32, "prompt": 200, "new": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: make .venv-vllm/.installed, and run with .venv-vllm/bin/python")
        sys.exit(2)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    torch.set_num_threads(args.threads)
    lm, tokenizer = load_policy(args.model, dtype=args.dtype), load_tokenizer(args.model)
    engines: dict[str, Engine] = {
        "HFEngine": HFEngine(stop_token_ids=[]),
        "VLLMEngine": VLLMEngine(stop_token_ids=[], isolated=False, max_length=512),
    }
    for engine in engines.values():
        engine.use_tokenizer(tokenizer)
        engine.sync(lm)
    torch.set_num_threads(args.threads)
    params = SamplingParams(max_new_tokens=args.new)
    times: Times = {}
    scored: dict[str, tuple[list[list[int]], list[Completion]]] = {}
    for engine in engines.values():  # what is compiled or allocated the first time
        timed(engine, prompts("different", -1, 4, args.prompt), SamplingParams(max_new_tokens=4))
    for repeat in range(args.repeats):
        for kind in ("shared", "different"):
            contexts = prompts(kind, repeat, args.batch, args.prompt)
            for name, engine in engines.items():
                wall, cores, found = timed(engine, contexts, params)
                times.setdefault((kind, name), []).append((wall, cores))
                print(f"{kind}, {name}: {wall:.1f} s, {cores:.1f} core s", file=sys.stderr)
                scored[name] = contexts[:4], found[:4]
    plain = lm.float()
    report(args, times, {name: errors(plain, *sample) for name, sample in scored.items()})
    for engine in engines.values():
        engine.close()
    os._exit(0)  # vLLM in this process waits for threads of its own


if __name__ == "__main__":
    main()
