"""How many groups teach nothing: relative against binary advantages, on real rollouts of the small VLM.

Run, after `lit-agentrl make-vlm` (about 10 minutes on 2 cores): `python benchmarks/derm_signal.py [--policy FOLDER]`.
The policy answers each of the first 70 validation lesions 8 times at temperature 1. A group of G is any G of a lesion's
answers, so the share for G is exact for these. Beside it stands p^G + (1 - p)^G with the one p of all answers, which is
what lesions of equal difficulty would give. Advantages are the module's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import torch
from prefix_tables import footer

from lit_agentrl.advantages import binary_advantages, standardize

HERE = Path(__file__).parent
SIZES = (2, 3, 4, 8)


def main() -> None:
    """Sample, count, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="smollm2-dinov2")
    parser.add_argument("--run", type=Path, default=Path("runs/bench_derm_signal"))
    parser.add_argument("--num_tasks", type=int, default=70)
    parser.add_argument("--output", type=Path, default=HERE / "derm_signal.md")
    args = parser.parse_args()
    transcripts = args.run / "transcripts" / "eval_test.jsonl"
    if not transcripts.exists():
        sample(args)
    rewards: dict[str, list[float]] = {}
    for line in transcripts.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        rewards.setdefault(record["prompt_id"], []).append(record["total_reward"])
    args.output.write_text(text(list(rewards.values()), args.policy))
    print(args.output.read_text())


def sample(args: argparse.Namespace) -> None:
    """Eight answers to each lesion, by the command that evaluates."""
    config = HERE.parent / "configs/experiment/derm_grpopp_cpu.yaml"
    suite = '{"class_path": "RecognitionSuite", "init_args": {"source": {"class_path": "SyntheticLesions"}}}'
    words = ["--config", str(config), "--model.pretrained", args.policy, "--trainer.default_root_dir", str(args.run)]
    words += ["--data.environment", suite, "--evaluation.split", "val", "--evaluation.group_size", "8"]
    words += ["--evaluation.num_tasks", str(args.num_tasks), "--evaluation.sampling.temperature", "1"]
    subprocess.run([sys.executable, "-m", "lit_agentrl", "evaluate", *words], check=True)


def text(groups: list[list[float]], policy: str) -> str:
    """The table."""
    p = sum(map(sum, groups)) / sum(map(len, groups))
    rows = [
        f"| {size} | {share(groups, size, 'grpo'):.2f} | {share(groups, size, 'binary'):.2f} | "
        f"{p**size + (1 - p) ** size:.2f} |"
        for size in SIZES
    ]
    solved = [sum(group) / len(group) for group in groups]
    spread = ", ".join(f"{sum(low <= s <= high for s in solved)}" for low, high in ((0, 0), (0.01, 0.99), (1, 1)))
    return (
        "# Groups without signal\n\n"
        f"`python benchmarks/derm_signal.py --policy {policy}`, which says what is counted: {len(groups)} synthetic\n"
        f"lesions, {len(groups[0])} answers each, {100 * p:.1f} % right. Lesions with no, some and only right\n"
        f"answers: {spread}. The share of groups in which every advantage is 0:\n\n"
        "| G | `grpo` | `binary: sign` | p^G + (1 - p)^G |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"{footer(torch.get_num_threads())}\n"
    )


def share(groups: list[list[float]], size: int, advantage: str) -> float:
    """The share of groups of `size` answers to one lesion whose advantages are all 0."""
    flat = total = 0
    for group in groups:
        for chosen in combinations(group, size):
            rewards = torch.tensor(chosen)
            values = standardize(rewards) if advantage == "grpo" else binary_advantages(rewards, mode="sign")
            flat += not values.any()
            total += 1
    return flat / total


if __name__ == "__main__":
    main()
