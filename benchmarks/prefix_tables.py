"""The Markdown tables of the shared-prefix benchmarks."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One forward, loss and backward in a process of its own."""

    cpu: float
    """Seconds of the process's cores."""
    wall: float
    """Seconds on the clock."""
    memory: float
    """MB that its peak resident memory grew by."""
    logprob_error: float
    """Largest difference of a target's log-probability from the float64 padded forward, nats."""
    gradient_error: float
    """|g - g64| / |g64| over all weights, Euclidean."""


@dataclass(frozen=True)
class CaseResult:
    """What was measured of one case."""

    name: str
    what: str
    padded_tokens: int
    unique_tokens: int
    micro_batch: int
    """Rows of the padded side's fastest micro-batch."""
    at_once: Measured
    """The padded side on all rows at once, measured once."""
    sides: dict[str, list[Measured]]
    """By side, one of each repeat."""
    ideals: tuple[float, float, float]
    """Operations on padded rows (all at once, at the best micro-batch) and unpadded ones, per operation on the tree."""
    choice: str
    """What the gate chooses."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def median(measured: Sequence[Measured], of: Callable[[Measured], float]) -> float:
    """The median over repeats."""
    return statistics.median(of(each) for each in measured)


def ratio(slow: Sequence[Measured], fast: Sequence[Measured]) -> tuple[float, float, float]:
    """How many times the CPU seconds: median, least and most over the repeats, each within one repeat."""
    each = [a.cpu / b.cpu for a, b in zip(slow, fast, strict=True)]
    return statistics.median(each), min(each), max(each)


def time_table(results: Sequence[CaseResult]) -> list[str]:
    """Seconds and ratios of every case."""
    header = (
        "case", "tokens", "padded, all rows", "padded, its best [rows]", "unshared packing", "prefix-grouper", "ours",
        "over all rows", "over padded", "over packing", "over prefix-grouper", "auto chooses", "auto over padded",
    )  # fmt: skip
    return markdown(header, [_time_row(result) for result in results])


def _time_row(result: CaseResult) -> list[str]:
    sides, ours = result.sides, result.sides["shared"]

    def seconds(name: str) -> str:
        if name not in sides:
            return "-"
        cpu, wall = (median(sides[name], of) for of in (lambda m: m.cpu, lambda m: m.wall))
        return f"{cpu:.2f} ({wall:.2f})"

    def over(name: str, ideal: float | None = None) -> str:
        if name not in sides:
            return "-"
        return _times(*ratio(sides[name], ours)) + ("" if ideal is None else f", ideal {ideal:.2f}")

    all_rows, best, packing = result.ideals
    whole = result.at_once.cpu / median(ours, lambda m: m.cpu)
    return [
        f"{result.name}: {result.what}",
        f"{result.padded_tokens:,} to {result.unique_tokens:,}",
        f"{result.at_once.cpu:.2f} ({result.at_once.wall:.2f})",
        f"{seconds('padded')} [{result.micro_batch}]",
        seconds("unshared"),
        seconds("prefix-grouper"),
        seconds("shared"),
        f"{whole:.2f}x, ideal {all_rows:.2f}",
        over("padded", best),
        over("unshared", packing),
        over("prefix-grouper"),
        result.choice,
        _times(*ratio(sides["padded"], sides.get("gated", ours))),
    ]


def _times(middle: float, least: float, most: float) -> str:
    return f"**{middle:.2f}x** ({least:.2f}-{most:.2f})"


def memory_table(results: Sequence[CaseResult]) -> list[str]:
    """Peak memory of every case."""
    rows = []
    for result in results:
        of = {name: median(repeats, lambda m: m.memory) for name, repeats in result.sides.items()}
        cells = [of.get(name) for name in ("padded", "unshared", "prefix-grouper", "shared")]
        rows.append(
            [result.name, f"{result.at_once.memory:.0f}"]
            + ["-" if cell is None else f"{cell:.0f}" for cell in cells]
            + [f"**{result.at_once.memory / of['shared']:.1f}x**" if of["shared"] else "-"]
        )
    header = (
        "case", "padded, all rows", "padded, its best", "unshared packing", "prefix-grouper",
        "ours, all rows", "all rows, over ours",
    )  # fmt: skip
    return markdown(header, rows)


def equality_table(results: Sequence[CaseResult]) -> list[str]:
    """Numerical errors of every case."""
    rows = []
    for result in results:
        for kind in ("logprob_error", "gradient_error"):
            cells = [
                f"{max(getattr(each, kind) for each in result.sides[name]):.1e}" if name in result.sides else "-"
                for name in ("padded", "unshared", "prefix-grouper", "shared")
            ]
            rows.append([result.name, {"l": "log-probability", "g": "gradient"}[kind[0]], *cells])
    return markdown(("case", "error of", "padded", "unshared packing", "prefix-grouper", "ours"), rows)


def footer(threads: int, *packages: str) -> str:
    """The machine and the versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
    return f"{machine()}, {threads} threads; Python {platform.python_version()}, {versions}."


def machine() -> str:
    """The processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
