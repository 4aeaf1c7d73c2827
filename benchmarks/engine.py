"""How much faster `HFEngine` answers one GRPO group than transformers' `generate` on copies of the prompt.

    python benchmarks/engine.py [--threads 2] [--repeats 3] [--group 8] [--prompt 256] [--new 32]

A Llama of SmolLM2-135M's shape with random weights, float32, greedy, both in this process and in turn. Tokens that
differ between the two are counted beside the times: with random weights, near-ties do occur.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, __version__

from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import SamplingParams


def smollm2() -> LlamaForCausalLM:
    """SmolLM2-135M's shape, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
        initializer_range=0.042,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def timed(
    work: Callable[[torch.Tensor], list[list[int]]], prompt: torch.Tensor
) -> tuple[float, float, list[list[int]]]:
    """Seconds on the clock, seconds of this process's cores, and the tokens."""
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = work(prompt)
    return time.perf_counter() - start, time.process_time() - cpu_start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"threads": 2, "repeats": 3, "group": 8, "prompt": 256, "new": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = smollm2()
    prompts = torch.randint(3, 49_152, (args.repeats + 1, args.prompt), generator=torch.Generator().manual_seed(1))
    engine = HFEngine(stop_token_ids=[])
    params = SamplingParams(temperature=0, max_new_tokens=args.new)

    def with_engine(prompt: torch.Tensor) -> list[list[int]]:
        engine.sync(lm)  # as after an optimiser step: nothing is cached
        return [completion.token_ids for completion in engine.generate([prompt.tolist()] * args.group, params)]

    def with_generate(prompt: torch.Tensor) -> list[list[int]]:
        ids = prompt.expand(args.group, -1)
        output = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=args.new)
        return output[:, args.prompt :].tolist()

    ways = {"HFEngine": with_engine, "generate": with_generate}
    # in turn, so that other load on the machine meets both; the first round only warms them up
    rounds = [{name: timed(work, prompt) for name, work in ways.items()} for prompt in prompts][1:]
    report(args, rounds)


def report(args: argparse.Namespace, rounds: list[dict[str, tuple[float, float, list[list[int]]]]]) -> None:
    print(f"torch {torch.__version__}, transformers {__version__}, {args.threads} threads, {args.repeats} repeats")
    print(f"group of {args.group}, prompt {args.prompt}, {args.new} new tokens\n")
    print("| | seconds (median) | of each repeat | core seconds (median) | new tokens/s |\n|---|---|---|---|---|")
    medians = {}
    for name in rounds[0]:
        seconds = [measured[name][0] for measured in rounds]
        medians[name] = median = statistics.median(seconds)
        core = statistics.median(measured[name][1] for measured in rounds)
        each = ", ".join(f"{value:.2f}" for value in seconds)
        print(f"| {name} | {median:.2f} | {each} | {core:.2f} | {args.group * args.new / median:.0f} |")
    pairs = [pair for r in rounds for pair in zip(r["HFEngine"][2], r["generate"][2], strict=True)]
    num_different = sum(ours != theirs for ours, theirs in pairs)
    print(f"\nHFEngine is {medians['generate'] / medians['HFEngine']:.2f} times as fast as generate;", end=" ")
    print(f"{num_different} of {len(pairs)} greedy sequences differ")


if __name__ == "__main__":
    main()
