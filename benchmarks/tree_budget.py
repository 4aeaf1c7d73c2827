"""What a tree of rollouts costs beside chains: turns and tool calls, rollouts with and without kept prefixes, training.

    python benchmarks/tree_budget.py [--data FOLDER] [--threads 1] [--repeats 3] [--prompts 1] [--top_k 2]

Takes about 15 minutes of one core; `--quick` checks the script in seconds. The tables go to
`benchmarks/tree_budget.md`. Three parts:

1. Turns and tool calls (`tree_counts.py`), without a model: `TreeRollout` with a policy that searches T - 1 times and
   then answers, beside the paper's formula for the cost and the exact mean. A chain is T turns and T - 1 tool calls.
2. Rollouts (`tree_rollouts.py`): SmolLM2-135M-Instruct, float32, on a search task with real passages. Whatever the
   untrained policy says counts as a search, for the question first and then for the titles it takes, so every episode
   has 3 searches and an answer. An engine that keeps the keys and values of earlier turns plays against the same engine
   that keeps none between calls (`max_cached_tokens=0`: within a call, contexts share what they have in common all the
   same), and against as many chains, with kept prefixes. Sides take turns on the same prompts, new ones in each repeat,
   with equal seeds: both tree sides sample the same tokens until rounding tips one over, which is counted.
3. Updates (`tree_updates.py`): loss (PPO-clip) and backward over all weights on the rows of the first repeat's trees
   and chains, the head on sampled tokens only. `PrefixGroupedModel` against the padded forward at the number of rows
   at a time (1, 2, all) that took least in one trial of each. On the first layers of the model: all layers are alike.

Core seconds are this process's; where others use the machine, those on the clock are more. `--data` names a folder with
`corpus.jsonl` (Search-R1's layout) and `questions.jsonl` (with `supporting_titles`); by default that is HotpotQA's in
`../shared/data/hotpotqa` beside the checkout, or else what `lit-agentrl make-facts-qa` makes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from prefix_tables import footer
from transformers import PreTrainedTokenizerBase
from tree_counts import Shape, count_table
from tree_rollouts import TURNS, Collected, Task, measure, rollout_table, search_suite
from tree_updates import compare, first_layers, update_table

from lit_agentrl.errors import UserError
from lit_agentrl.models.policy import load_policy, load_tokenizer
from lit_agentrl.rollouts.base import Prompt
from lit_agentrl.rollouts.chat import Chat

HERE = Path(__file__).parent
HOTPOTQA = HERE.parent.parent / "shared" / "data" / "hotpotqa"
SHAPES: tuple[Shape, ...] = ((2, 2, 1), (1, 4, 1))
QUICK = {"repeats": 1, "prompts": 1, "max_new_tokens": 4, "count_prompts": 8, "count_turns": 2, "layers": 1, "top_k": 1}
MAX_LENGTH = 8192


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOTPOTQA if HOTPOTQA.is_dir() else None, help="corpus, questions")
    parser.add_argument("--pretrained", default="smollm2-135m-instruct")
    numbers = {"threads": 1, "repeats": 3, "prompts": 1, "top_k": 2, "max_new_tokens": 32}
    for name, value in (numbers | {"layers": 6, "count_prompts": 100, "count_turns": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quick", action="store_true", help="the least of everything, nothing written by default")
    parser.add_argument("--output", type=Path, help="where the tables go; benchmarks/tree_budget.md unless quick")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    try:
        text = report(args, load)
    except UserError as error:  # 2 is what `make bench` takes for "cannot run here"
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(text)
    output = args.output or (None if args.quick else HERE / "tree_budget.md")
    if output:
        output.write_text(text)


def report(args: argparse.Namespace, load: float) -> str:
    """All parts with their machine."""
    tokenizer = load_tokenizer(args.pretrained)
    counts = count_table(tokenizer, args.count_prompts, args.count_turns)
    print("\n".join(counts), flush=True)
    with tempfile.TemporaryDirectory() as made:
        task = make_task(args, Path(made), tokenizer)
        found = {shape: measure(task, shape, prompts_of(task, args, i)) for i, shape in enumerate(SHAPES)}
    for shape in SHAPES:
        print("\n".join(rollout_table(found[shape])), flush=True)
    first = found[SHAPES[0]]
    updates = update_lines(args, task, first)
    lines = [
        "# What trees cost beside chains",
        "",
        f"`python benchmarks/tree_budget.py{' --quick' if args.quick else ''}`, which says what is measured.",
        "",
        "## Turns and tool calls",
        "",
        f"A policy of T turns; {args.count_prompts} prompts, mean and standard error. Costs in chains; the last three",
        "columns are trajectories per chain that is paid for: by the formula, and measured (uniform).",
        "",
        *counts,
        "",
        "## Rollouts",
        "",
        f"{args.prompts} prompt(s) a repeat, {args.repeats} repeats: {TURNS} searches of {args.top_k} passages and an",
        f"answer, {args.max_new_tokens} tokens at most a turn, temperature 1. Medians; ratios are of core seconds",
        "within one repeat (in brackets, the least and the most). A tree plays its rounds one after another: it",
        "decodes in up to L + 1 times as many steps as chains, each with fewer sequences.",
        "",
    ]
    for shape, sides in found.items():
        size = len(sides["tree, prefixes kept"][0].groups[0].trajectories)
        lines += [f"(M, N, L) = {shape}: {size} trajectories of a prompt.", "", *rollout_table(sides), ""]
    lines += ["## Updates", "", *updates, "", footer(args.threads)]
    lines += [f"Load when it began: {load:.1f}; when it ended: {os.getloadavg()[0]:.1f}.", ""]
    return "\n".join(lines)


def make_task(args: argparse.Namespace, made: Path, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The search task with its policy, and one turn of both to warm up."""
    suite = search_suite(args.data, made, args.top_k)
    lm: Any = load_policy(args.pretrained)
    task = Task(suite, Chat(tokenizer, "inline"), lm, args.max_new_tokens, MAX_LENGTH)
    with torch.no_grad():
        lm(input_ids=torch.zeros(1, 64, dtype=torch.int64))
    return task


def prompts_of(task: Task, args: argparse.Namespace, place: int) -> list[list[Prompt]]:
    """The prompts of every repeat, others for each shape."""
    tasks = task.suite.tasks("train")
    first = place * args.repeats * args.prompts
    numbers = range(first, first + args.repeats * args.prompts)
    prompts = [Prompt(tasks[number % len(tasks)], number) for number in numbers]
    return [prompts[i : i + args.prompts] for i in range(0, len(prompts), args.prompts)]


def update_lines(args: argparse.Namespace, task: Task, found: dict[str, list[Collected]]) -> list[str]:
    """The last part."""
    total = task.lm.config.num_hidden_layers
    lm = first_layers(task.lm, args.layers)
    sides = {name.split(",")[0]: found[name][0].groups for name in ("tree, prefixes kept", "chains, prefixes kept")}
    size = sum(len(group.trajectories) for group in sides["tree"])
    compared = {name: compare(lm, groups, args.repeats) for name, groups in sides.items()}
    shared = {name: min(each.core for each in of.shared) for name, of in compared.items()}
    return [
        f"The {size} trajectories of each side of the first repeat of {SHAPES[0]}; {args.layers} of the policy's",
        f"{total} layers, {args.repeats} repeats.",
        "",
        *update_table(compared),
        "",
        f"Chains over tree, both shared, least of the repeats: {shared['chains'] / shared['tree']:.2f}x.",
    ]


if __name__ == "__main__":
    main()
