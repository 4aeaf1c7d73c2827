"""What sharing prefixes saves of a whole training step: recipes run with sharing on and off, by phase.

Run: `python benchmarks/sharing_step.py [--config RECIPE.yaml ...] [--iterations 3] [--repeats 2]`; what follows a bare
`--` is given to every run (`-- --data.num_prompts 4`). The table goes to `benchmarks/sharing_step.md`. The default, the
quickstart's RL recipe, takes about 20 minutes on 2 cores.

Each run is the command line's `fit` in a process of its own, on SmolLM2-135M-Instruct with the recipe's adapter and the
same seed; only `model.share_prefix` differs (auto, false). Runs take turns, and every other repeat begins with the
other side. The first iteration of a run warms up. Evaluation is off, and the reward is the share of even token ids: an
untrained policy would earn equal rewards, and then no side would have anything to learn, or to agree on.

Phases are what the run logs: collect (rollouts), prepare (advantages, rows, scoring by reference and old policy), and
update (forward, backward, optimiser). Both sides sample from one seed, so they generate the same tokens until rounding
differs in a sampled token; a sentence below each table says how far they agree.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from prefix_tables import footer, markdown

from lit_agentrl.types import Trajectory

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "configs" / "experiment" / "grpopp_textworld.yaml"
SIDES = {"on": "auto", "off": "false"}
SHORT = 0.05  # seconds
PHASES = ("collect", "prepare", "update", "step")


def even_share(trajectory: Trajectory) -> float:
    """The reward: the share of even ids among the sampled tokens."""
    ids = [token for step in trajectory.steps for token in step.action_ids]
    return sum(token % 2 == 0 for token in ids) / max(1, len(ids))


@dataclass(frozen=True)
class Run:
    """What one run logged."""

    iterations: list[dict[str, float]]
    """Metrics of every iteration."""
    weights: dict[str, torch.Tensor]
    """The trained ones, after the last iteration."""

    def seconds(self, phase: str) -> float:
        """The median over the counted iterations."""
        of: Callable[[dict[str, float]], float] = {
            "collect": lambda m: m["time/collect"],
            "prepare": lambda m: m["time/advantages"] + m["time/prepare"],
            "update": lambda m: m["time/update"],
            "step": lambda m: m["time/collect"] + m["time/advantages"] + m["time/prepare"] + m["time/update"],
        }[phase]
        return statistics.median(of(metrics) for metrics in self.iterations[1:])


def main() -> None:
    """Run the recipes, print the tables and write them."""
    border = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, passed = sys.argv[1:border], sys.argv[border + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[QUICKSTART])
    parser.add_argument("--iterations", type=int, default=3, help="counted iterations of a run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of a side")
    parser.add_argument("--pretrained", default="smollm2-135m-instruct")
    parser.add_argument("--output", type=Path, default=HERE / "sharing_step.md")
    args = parser.parse_args(words)
    sections = []
    for config in args.config:
        runs: dict[str, list[Run]] = {side: [] for side in SIDES}
        for repeat in range(args.repeats):
            for side in list(SIDES)[:: 1 if repeat % 2 == 0 else -1]:
                runs[side].append(run(config, side, args, passed))
                print(repeat, side, {phase: round(runs[side][-1].seconds(phase), 2) for phase in PHASES}, flush=True)
        sections += [f"## {config.stem}", "", *table(runs), ""]
    text = report(sections, args, passed)
    print(text)
    args.output.write_text(text)


def run(config: Path, side: str, args: argparse.Namespace, passed: list[str]) -> Run:
    """One run of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": str(config),
            "seed_everything": "0",
            "trainer.max_epochs": str(args.iterations + 1),
            "trainer.default_root_dir": folder,
            "model.pretrained": args.pretrained,
            "model.share_prefix": SIDES[side],
            "data.rewards": '[{"function": "sharing_step.even_share"}]',
            "evaluation.at_start": "false",
            "evaluation.at_end": "false",
            "transcripts.show": "0",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        done = subprocess.run(
            [sys.executable, "-m", "lit_agentrl", "fit", *words, *passed],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)},
        )
        if done.returncode:
            raise SystemExit(f"{config}, sharing {side}, failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        state = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        return Run(logged(Path(folder)), {name: weight for name, weight in state.items() if weight.is_floating_point()})


def logged(folder: Path) -> list[dict[str, float]]:
    """The metrics of every iteration; a logger may have put one iteration's on several lines."""
    iterations: dict[str, dict[str, float]] = {}
    for path in folder.glob("logs/version_*/metrics.csv"):
        for row in csv.DictReader(path.open()):
            values = {name: float(value) for name, value in row.items() if value and name not in ("epoch", "step")}
            iterations.setdefault(row["epoch"], {}).update(values)
    return [iterations[epoch] for epoch in sorted(iterations, key=int)]


def table(runs: dict[str, list[Run]]) -> list[str]:
    """Seconds by phase, how many times faster, and how far the sides agree."""
    rows = []
    for side, of_side in runs.items():
        seconds = [statistics.median(each.seconds(phase) for each in of_side) for phase in PHASES]
        memory = max(each.iterations[-1]["memory/peak_gib"] for each in of_side)
        rows.append([f"sharing {side}", *(f"{value:.2f}" for value in seconds), f"{memory:.2f}"])
    pairs = list(zip(runs["off"], runs["on"], strict=True))
    ratios = [[off.seconds(phase) / on.seconds(phase) for off, on in pairs] for phase in PHASES]
    peaks = [off.iterations[-1]["memory/peak_gib"] / on.iterations[-1]["memory/peak_gib"] for off, on in pairs]
    cells = [f"**{statistics.median(each):.2f}x** ({min(each):.2f}-{max(each):.2f})" for each in [*ratios, peaks]]
    for place, phase in enumerate(PHASES):
        if any(off.seconds(phase) < SHORT for off, _ in pairs):
            cells[place] = "-"  # a ratio of noise
    rows.append(["off over on", *cells])
    lines = markdown(("", *(f"{phase} s" for phase in PHASES), "peak GiB"), rows)
    return [*lines, "", agreement(*pairs[0])]


def agreement(off: Run, on: Run) -> str:
    """A sentence: what the sides have in common."""
    pairs = list(zip(off.iterations, on.iterations, strict=True))
    same = sum(all(a[name] == b[name] for name in ("tokens/generated", "reward/mean")) for a, b in pairs)
    losses = [metrics["train/loss"] for metrics in pairs[0]]
    names = sorted(off.weights)
    difference, size = (
        torch.stack([part.double().norm() for part in parts]).norm()
        for parts in ([off.weights[n] - on.weights[n] for n in names], [off.weights[n] for n in names])
    )
    return (
        f"First iteration: {on.iterations[0]['tokens/trained']:.0f} trained tokens, losses {losses[0]:.6f} and "
        f"{losses[1]:.6f}, {abs(losses[0] - losses[1]):.1e} apart. As many tokens and the same rewards in {same} of "
        f"{len(pairs)} iterations. Trained weights at the end: relative difference {float(difference / size):.1e}."
    )


def report(sections: list[str], args: argparse.Namespace, passed: list[str]) -> str:
    """All tables with their machine."""
    extra = f" -- {' '.join(passed)}" if passed else ""
    lines = [
        "# Whole training steps with and without shared prefixes",
        "",
        f"`python benchmarks/sharing_step.py{extra}`, which says what is measured.",
        f"Runs of a side: {args.repeats}; counted iterations of each: {args.iterations}. Medians of the runs' medians;",
        f"ratios within one repeat (in brackets, the least and the most). Policy: {args.pretrained}.",
        "",
        *sections,
        footer(torch.get_num_threads(), "lightning", "peft"),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
