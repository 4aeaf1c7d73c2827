"""What `scaling_model.py` is fitted to: this project's measurements on one H100, each with what its file says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefix_batches import Work, group, padded_work, tree_work, unshared_work
from scaling_shapes import MEASURED


@dataclass(frozen=True)
class Update:
    """An update (or a forward and backward alone) of Qwen3-0.6B's shape in bfloat16, all weights trained."""

    name: str
    source: str
    quotes: tuple[str, ...]
    """What that file says, word for word; a test looks for it there."""
    seconds: float
    flops: tuple[float, float]
    """Of matrices and of scores, forward and backward."""
    tokens: int
    micro_batches: int
    attention: Literal["flash", "flex"]
    has_optimizer: bool = False


@dataclass(frozen=True)
class Rollout:
    """A collection, or a call of the engine alone, by `HFEngine`."""

    name: str
    source: str
    quotes: tuple[str, ...]
    seconds: float
    steps: int
    """Tokens that are decoded one after another."""
    collects: bool
    """Whether environments and chats are in it."""


@dataclass(frozen=True)
class Memory:
    """Peak beyond the weights of a forward and backward, GiB."""

    name: str
    quotes: tuple[str, ...]
    gib: float
    tokens: int


FILES = ("prefix_gpu_0.6b", "gpu_recipes", "vs_trl_gpu", "gpu_engine")
PREFIX, RECIPES, TRL, ENGINE = (f"benchmarks/{name}.md" for name in FILES)
NEW = 16
"""New tokens of an episode of the recipes: tokens a second times seconds give 16 each, a single turn that was cut."""
CASE_A, CASE_8K = group(8, 2048, 128, 1000), group(4, 8192, 512, 1000)


def _three(work: Work) -> tuple[float, float]:
    matrices, scores = MEASURED.forward_flops(work)
    return 3 * matrices, 3 * scores


def _case(name: str, batch: object, ms: tuple[float, float, float], rows: int) -> list[Update]:
    works = (
        ("padded", padded_work(batch, rows), "flash"),  # type: ignore[arg-type]
        ("unshared packing", unshared_work(batch), "flex"),  # type: ignore[arg-type]
        ("shared", tree_work(batch), "flex"),  # type: ignore[arg-type]
    )
    return [
        Update(f"{name}, {side}", PREFIX, (f"{each} (",), each / 1e3, _three(work), work.tokens, 1, kernel)  # type: ignore[arg-type]
        for (side, work, kernel), each in zip(works, ms, strict=True)
    ]


def _recipe(name: str, rows: int, on: tuple[float, float, int], off: tuple[float, int, int]) -> list[Update]:
    """`on` is seconds, TFLOP/s and unique tokens; `off` seconds, padded tokens and micro-batches."""
    (fast, rate, unique), (slow, padded, micro) = on, off
    length = padded // rows
    plain = Work(padded, rows * length * (length + 1) // 2, rows * NEW)
    shared_flops = fast * rate * 1e12
    return [
        Update(
            f"{name}, shared", RECIPES, (f"{fast:.3f} |", f"| {unique:,} |", f"| {rate} |"), fast, (shared_flops, 0.0),
            unique, 1, "flex", True,
        ),
        Update(f"{name}, padded", RECIPES, (f"{slow:.3f} |", f"| {padded:,} |"), slow, _three(plain), padded, micro,
               "flash", True),
    ]  # fmt: skip


def _trl(name: str, seconds: float) -> Update:
    """One prompt of 1,024 tokens, 8 answers of 64."""
    pairs = 1024 * 1025 // 2 + 8 * sum(range(1025, 1089))
    return Update(name, TRL, (f"| {seconds} |",), seconds, _three(Work(1536, pairs, 512)), 1536, 1, "flex", True)


UPDATES: list[Update] = [
    *_case("case A", CASE_A, (343.4, 380.4, 132.2), 8),
    *_case("case 8K", CASE_8K, (788.3, 971.9, 344.3), 4),
    *_recipe("Tree-GRPO", 24, (0.141, 45.8, 1871), (0.708, 34_896, 3)),
    *_recipe("GRPO++", 32, (0.156, 45.0, 1999), (0.943, 46_528, 4)),
    *_recipe("GiGPO", 32, (0.133, 55.8, 2109), (0.967, 47_552, 4)),
    _trl("GRPO against TRL, run 1", 0.147),
    _trl("GRPO against TRL, run 2", 0.151),
]
ROLLOUTS: list[Rollout] = [
    Rollout("engine alone, first", ENGINE, ("2.09, 1.86",), 2.09, 64, False),
    Rollout("engine alone, second", ENGINE, ("2.09, 1.86",), 1.86, 64, False),
    Rollout("GRPO against TRL, run 1", TRL, ("| 1.82 |",), 1.82, 64, True),
    Rollout("GRPO against TRL, run 2", TRL, ("| 2.23 |",), 2.23, 64, True),
    *(
        Rollout(f"{name}, {side}", RECIPES, (f"sharing {side} | {seconds:.3f} |",), seconds, NEW, True)
        for name, sides in (("Tree-GRPO", (0.971, 0.883)), ("GRPO++", (1.080, 0.889)), ("GiGPO", (0.916, 0.995)))
        for side, seconds in zip(("on", "off"), sides, strict=True)
    ),
]
MEMORIES: list[Memory] = [
    Memory("case A, padded", ("| 34.26 |",), 34.26, 17_408),
    Memory("case A, shared", ("| 7.32 |",), 7.32, 3_072),
    Memory("case 8K, padded", ("| 66.99 |",), 66.99, 34_816),
    Memory("case 8K, shared", ("| 20.80 |",), 20.80, 10_240),
]
PREPARE = (0.061, 46_528, ("0.061 |", "46,528"))
"""Seconds on the host and row tokens: the slowest of the recipes."""
CONTINUOUS_BATCHING = (6.05, ("6.05 (once)",))
"""Seconds of the engine's call by transformers' continuous batching with sdpa, its set-up included."""
