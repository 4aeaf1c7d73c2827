"""The report of `gigpo_learning.py`: a Markdown table with intervals, and the curves as an SVG."""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lit_agentrl.intervals import wilson_interval

COLOURS = {"grpo": "#777777", "gigpo": "#c0392b", "gigpo_text": "#2166ac"}
TITLES = {"grpo": "GRPO", "gigpo": "GiGPO", "gigpo_text": "GiGPO, text anchors"}
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 320, 50, 280


def write_report(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Print the table and write `gigpo_learning.md` and `.svg`."""
    if not results:
        print("Nothing has finished yet.")
        return
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in sorted(results, key=lambda r: (list(TITLES).index(r["method"]), r["seed"])):
        by_method[one["method"]].append(one)
    text = "\n".join(
        [*head(), *success_table(by_method), *difference(by_method), *time_table(by_method), *foot(by_method)]
    )
    print(text)
    (folder / "gigpo_learning.md").write_text(text)
    (folder / "gigpo_learning.svg").write_text(curves(by_method))


def head() -> list[str]:
    """What was asked."""
    return [
        "# GiGPO against GRPO on TextWorld games of 6 to 8 commands",
        "",
        "`python benchmarks/gigpo_learning.py`. Success on held-out games, sampled, from one warmed-up policy of a",
        "million weights; everything but the advantage is the same, and was chosen once for both. Wilson's",
        "interval is over all games of all seeds: it is about the games, and knows little of other seeds.",
        "",
        "![Success by iteration](gigpo_learning.svg)",
        "",
    ]


def success_table(by_method: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for every method and seed, and the means."""
    lines = ["| method | seed | start | best | end | mean of the curve |", "|---|---|---|---|---|---|"]
    for method, runs in by_method.items():
        for one in runs:
            values = [value for _, value in one["curve"]]
            numbers = (values[0], max(values), values[-1], statistics.mean(values))
            lines.append(f"| {TITLES[method]} | {one['seed']} | {' | '.join(map(percent, numbers))} |")
        won = [won for one in runs for won in one["won"].values()]
        low, high = wilson_interval(sum(won), len(won))
        area = statistics.mean(statistics.mean(value for _, value in one["curve"]) for one in runs)
        share = sum(won) / len(won)
        lines.append(
            f"| **{TITLES[method]}** | all | | | **{percent(share)}** [{percent(low)}, {percent(high)}] | "
            f"{percent(area)} |"
        )
    return [*lines, ""]


def difference(by_method: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How much more often each GiGPO wins than GRPO on the same games and seeds, with a paired bootstrap over games."""
    lines = []
    for method in by_method.keys() - {"grpo"} if "grpo" in by_method else ():
        seeds = {one["seed"] for one in by_method[method]} & {one["seed"] for one in by_method["grpo"]}
        ours, theirs = ([one["won"] for one in by_method[m] if one["seed"] in seeds] for m in (method, "grpo"))
        games = sorted(set.intersection(*(set(won) for won in [*ours, *theirs]))) if seeds else []
        if not games:
            continue
        gains = np.array([np.mean([w[g] for w in ours]) - np.mean([w[g] for w in theirs]) for g in games])
        draws = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        lines.append(
            f"{TITLES[method]} minus GRPO at the end, {len(seeds)} seeds: {100 * gains.mean():+.1f} points, 95 % "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] (paired bootstrap over {len(games)} games)."
        )
    return [*lines, ""]


def time_table(by_method: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Seconds of an iteration by phase, and what the advantages are of it."""
    lines = [
        "| method | collect s | advantages ms | rows, prepare s | update s | advantages' share |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs in by_method.items():
        count = sum(one["iterations"] for one in runs)
        mean = {phase: sum(one["seconds"][phase] for one in runs) / count for phase in runs[0]["seconds"]}
        step = mean["collect"] + mean["advantages"] + mean["prepare"] + mean["update"]
        lines.append(
            f"| {TITLES[method]} | {mean['collect']:.1f} | {1000 * mean['advantages']:.2f} | {mean['prepare']:.2f} | "
            f"{mean['update']:.1f} | {100 * mean['advantages'] / step:.4f} % |"
        )
    return [*lines, ""]


def foot(by_method: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What else was counted, the machine and the versions."""
    lines = []
    for method, runs in by_method.items():
        names = sorted(set.intersection(*(set(one["means"]) for one in runs)))
        means = ", ".join(f"{name} {statistics.mean(one['means'][name] for one in runs):.3f}" for name in names)
        lines.append(f"{TITLES[method]}, means over training: {means}.\n")
    info = Path("/proc/cpuinfo")
    cpu = (
        next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), "")
        if info.exists()
        else ""
    )
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "lightning", "peft", "textworld")
    )
    games = len(next(iter(by_method.values()))[0]["won"])
    return [
        *lines,
        f"{games} games. {cpu or platform.processor()}, 1 thread a run. "
        f"Python {platform.python_version()}, {packages}.",
        "",
    ]


def curves(by_method: dict[str, list[dict[str, Any]]]) -> str:
    """Success by iteration: a thin line a seed, a thick one for their mean."""
    last = max(iteration for runs in by_method.values() for one in runs for iteration, _ in one["curve"]) or 1

    def points(curve: Sequence[tuple[int, float]]) -> str:
        width, height = WIDTH - LEFT - 20, BOTTOM - 20
        return " ".join(f"{LEFT + width * i / last:.1f},{BOTTOM - height * value:.1f}" for i, value in curve)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
    ]
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = BOTTOM - (BOTTOM - 20) * share
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{100 * share:.0f} %</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">iteration (0 to {last})</text>')
    for place, (method, runs) in enumerate(by_method.items()):
        line = f'fill="none" stroke="{COLOURS[method]}"'
        values: dict[int, list[float]] = defaultdict(list)
        for one in runs:
            parts.append(f'<polyline {line} stroke-opacity="0.35" points="{points(one["curve"])}"/>')
            for iteration, value in one["curve"]:
                values[iteration].append(value)
        mean = [(iteration, statistics.mean(values[iteration])) for iteration in sorted(values)]
        parts.append(f'<polyline {line} stroke-width="3" points="{points(mean)}"/>')
        parts.append(f'<text x="{LEFT + 10}" y="{34 + 16 * place}" fill="{COLOURS[method]}">{TITLES[method]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def percent(share: float) -> str:
    """As text."""
    return f"{100 * share:.1f} %"
