"""What a check of the canary costs, in CPU seconds, beside what it cost before.

    python benchmarks/canary_cost.py [--repeats 5 --output benchmarks/canary_cost.md]

SmolLM2-135M in float32 under a LoRA adapter of rank 16, one thread, engines that share the weights and that hold a
copy; every repeat times both sides, one after the other. Before, layers were merged in memory that was new each time,
moments were taken of 32 MiB of float64 at a time and read after each, and the policy's and the engine's fingerprint
were both computed in any case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.models.fingerprint import CHUNK, distance, policy_fingerprint
from lit_agentrl.models.policy import Lora, load_tokenizer
from lit_agentrl.rollouts.canary import Canary, Trainee
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Fingerprint, SamplingParams, TrainBatch


class Silent(HFEngine):
    """What is left without fingerprints: 16 tokens decoded and a forward."""

    def fingerprint(self) -> None:
        """It cannot tell."""


def merged_before(lm: nn.Module) -> Iterator[Tensor]:
    """Every weight once, those under the adapter with its update added."""
    seen: set[int] = set()
    for layer in lm.modules():
        if isinstance(layer, Linear):
            seen.update(id(parameter) for parameter in layer.parameters())
            yield layer.get_base_layer().weight + layer.get_delta_weight("default")
    yield from (parameter for parameter in lm.parameters() if id(parameter) not in seen)


@torch.no_grad()
def before(lm: nn.Module, dtype: torch.dtype | None = None) -> Fingerprint:
    """A fingerprint as it was: of no module, so that the engine's and the policy's are two."""
    count, total, squares = 0, 0.0, 0.0
    for tensor in merged_before(lm):
        count += tensor.numel()
        for part in tensor.reshape(-1).split(CHUNK):
            numbers = part.to(dtype or part.dtype).double()
            total, squares = total + float(numbers.sum()), squares + float(numbers.dot(numbers))
    return Fingerprint(count, total, squares)


def as_before(work: Callable[[], object]) -> Callable[[], object]:
    """The same with fingerprints as they were."""

    def run() -> object:
        with ExitStack() as stack:
            for user in ("canary", "sampled_weights"):
                stack.enter_context(patch(f"lit_agentrl.rollouts.{user}.policy_fingerprint", before))
            return work()

    return run


def seconds(works: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """CPU seconds of each, a value a repeat; the first round warms up."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for values, work in zip(taken, works, strict=True):
            began = time.process_time()
            work()
            values.append(time.process_time() - began)
    return [values[1:] for values in taken]


def parts(pretrained: str) -> tuple[Trainee, Chat]:
    """A policy whose adapter is not zero, and what writes the prompts."""
    module = GRPOPlusPlusModule(pretrained=pretrained, lora=Lora(r=16))
    module.configure_model()
    assert module.policy is not None
    for parameter in module.policy.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)

    @torch.no_grad()
    def score(batch: TrainBatch) -> Tensor:
        return module.score(batch).logprobs.float()

    return Trainee(module.policy, score, nullcontext), Chat(load_tokenizer(pretrained))


def main() -> None:
    """Time both sides and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainee, chat = parts(options.pretrained)
    lm = trainee.policy.lm
    shared, copied, silent = HFEngine(), HFEngine(own_weights=True), Silent()

    def check(engine: HFEngine) -> Callable[[], object]:
        def run() -> object:
            engine.sync(trainee.policy)  # keys and values of the last check are forgotten, as in a run
            return Canary().check(engine, trainee, chat, SamplingParams())

        return run

    def fingerprint() -> object:
        return policy_fingerprint(lm)

    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "a fingerprint": (lambda: before(lm), fingerprint),
        "sync and check, log-probabilities alone": (as_before(check(silent)), check(silent)),
        "sync and check, the engine shares the weights": (as_before(check(shared)), check(shared)),
        "sync and check, the engine has a copy": (as_before(check(copied)), check(copied)),
    }
    taken = seconds([work for pair in sides.values() for work in pair], options.repeats)
    now = policy_fingerprint(lm)
    assert now is not None
    lines = [
        f"# What the canary costs: {options.pretrained}",
        "",
        f"`python benchmarks/canary_cost.py --repeats {options.repeats}`: torch {torch.__version__}, one thread, "
        "float32, LoRA r 16. CPU seconds, median (smallest to largest).",
        "",
        "| | before | now | ratio of medians |",
        "|---|---|---|---|",
    ]
    for index, name in enumerate(sides):
        old, new = taken[2 * index], taken[2 * index + 1]
        shown = [f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in (old, new)]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} | {median(new) / median(old):.2f} |")
    lines += ["", f"Distance between the fingerprints of both sides: {distance(before(lm), now):.1e}."]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
