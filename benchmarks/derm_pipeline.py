"""Does every stage of the VLM chain do what it is there for? Base, SFT alone, GRPO, GRPO++, and GRPO++ -> SFT -> DPO.

Run, after `lit-agentrl make-vlm`: `python benchmarks/derm_pipeline.py [--seeds 0 1 2] [--accelerator gpu --jobs 3]`. On
two CPU cores a seed takes about an hour. All arms start from the same small VLM and are evaluated on the same held-out
panel of synthetic lesions: 210 to recognise, 126 questions whose answers the knowledge graph judges, greedily. Seeds
change what is trained (order, sampling, adapters), not the pictures. GRPO differs from GRPO++ in nothing but the
advantage. 15 % of the conversations' answers hold a wrong fact that was put in on purpose.

What is finished is not run again. The table lies beside this file; a mean comes with Student's 95 % interval over
seeds, differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
from prefix_tables import footer

from lit_agentrl.report.seeds import over_seeds

HERE = Path(__file__).parent


def main() -> None:
    """Run every seed's pipeline and write the table over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", default="smollm2-dinov2", help="the VLM that all arms start from")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run side by side")
    parser.add_argument("--root", type=Path, default=Path("runs/bench_derm"))
    parser.add_argument("--output", type=Path, default=HERE / "derm_pipeline.md")
    parser.add_argument("more", nargs="*", metavar="key=value", help="for the pipeline file, derm_arms.yaml")
    args = parser.parse_intermixed_args()
    roots = [args.root / str(seed) for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda seed: run(seed, args), args.seeds))
    if any(codes):
        sys.exit(f"seeds {[seed for seed, code in zip(args.seeds, codes, strict=True) if code]} failed")
    args.output.write_text(text(roots, args))
    print(args.output.read_text())


def run(seed: int, args: argparse.Namespace) -> int:
    """One seed's pipeline; its exit status."""
    words = [f"root={args.root / str(seed)}", f"seed={seed}", f"base={args.base}", f"accelerator={args.accelerator}"]
    log = args.root / f"{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lit_agentrl", "pipeline", str(HERE / "derm_arms.yaml"), *words, *args.more]
    with log.open("a") as out:
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ).returncode


def text(roots: list[Path], args: argparse.Namespace) -> str:
    """The table with how it was made."""
    seconds = [stage_seconds(root) for root in roots]
    names = list(seconds[0])
    lines = [f"| {name} | " + " | ".join(f"{of[name]:.0f}" for of in seconds) + " |" for name in names]
    head = "| stage | " + " | ".join(f"seed {root.name}" for root in roots) + " |\n|" + " --- |" * (len(roots) + 1)
    seeds = " ".join(root.name for root in roots)
    return (
        "# The VLM chain, stage by stage\n\n"
        f"`python benchmarks/derm_pipeline.py --seeds {seeds} --accelerator {args.accelerator} --jobs {args.jobs}"
        f"{''.join(' ' + word for word in args.more)}`, which says what the arms are. Synthetic lesions: nothing here\n"
        "says anything about real skin.\n\n"
        f"{over_seeds(roots).markdown()}\n\n## Seconds of each stage\n\n{head}\n"
        + "\n".join(lines)
        + f"\n\n{footer(torch.get_num_threads())}\n"
    )


def stage_seconds(root: Path) -> dict[str, float]:
    """Wall clock of every stage, its start included."""
    found = {}
    for name, stage in json.loads((root / "lineage.json").read_text())["stages"].items():
        began, ended = (datetime.fromisoformat(stage[key].replace("Z", "+00:00")) for key in ("started", "ended"))
        found[name] = (ended - began).total_seconds()
    return found


if __name__ == "__main__":
    main()
