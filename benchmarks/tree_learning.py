"""Does the tree learn more for the same budget? Tree-GRPO against GRPO on chains, on questions of 1 to 3 searches.

Run (about 18 minutes on one core): `python benchmarks/tree_learning.py [--seeds 0 1 2 3 4] [--root runs/bench_tree]`.
The policy is a million weights, trained from nothing in a made-up world (`clue_world.py`): first on solutions, then on
plays that follow the clues as they should and stop after one, two or three searches, whatever is asked. What is left to
learn is when to answer, from the reward at the end alone. From there all arms share every setting
(`tree_learning.yaml`, chosen once on the tree arm's seed 0), and `lit-agentrl compare` trains them to the same number
of generated tokens:

- tree: (M, N, L) = (2, 2, 1), 6 leaves of a prompt, both advantages;
- inter: the same trees, leaves compared within the prompt alone (the paper's ablation, its Table 4);
- chain: groups of 4 chains, GRPO; the paper's nominal equal of (2, 2, 1).

Other starts were tried first, on trees alone, and given up before a chain was run: policies that still copied names
wrongly learnt nothing at a learning rate of 3e-4 and collapsed at 1e-3 with several updates an iteration. 16 prompts an
iteration became 8 to see more of the curve.

What is finished is not run again. The report is copied beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from clue_world import build_policy, write_aimless_plays, write_world
from prefix_tables import footer

from lit_agentrl.envs import SearchSuite
from lit_agentrl.retrieval import BM25Retriever

HERE = Path(__file__).parent
RECIPE = HERE / "tree_learning.yaml"
EPOCHS = {"solutions": 24, "aimless": 2}
"""Of the two warm-ups. After the first about 90 % of the held-out questions are answered, after both a third."""


def main() -> None:
    """Make the world and the start, compare, and copy the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=40_000, help="generated tokens of a run")
    parser.add_argument("--root", type=Path, default=Path("runs/bench_tree"))
    parser.add_argument("--out", type=Path, default=HERE, help="where the report goes")
    args = parser.parse_args()
    environment = suite_options(args.root / "world")
    start = warm_up(args.root, environment)
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    recipe["model"]["init_args"]["pretrained"] = str(start)
    recipe["data"]["init_args"]["environment"] = environment
    (args.root / "arm.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    path = args.root / "compare.yaml"
    path.write_text(yaml.safe_dump(comparison(args), sort_keys=False))
    lit_agentrl(["compare", "--config", str(path)])
    report = (args.root / "compare" / "report.md").read_text()
    title, _, rest = report.partition("\n\n")
    said = "`python benchmarks/tree_learning.py`, which says what is compared."
    text = f"{title}\n\n{said}\n\n{rest.rstrip()}\n\n{footer(1)}\n".replace("(report.png)", "(tree_learning.png)")
    (args.out / "tree_learning.md").write_text(text)
    shutil.copy(args.root / "compare" / "report.png", args.out / "tree_learning.png")


def suite_options(world: Path) -> dict[str, Any]:
    """The recipe's environment, in this world."""
    options: dict[str, Any] = yaml.safe_load(RECIPE.read_text())["data"]["init_args"]["environment"]
    given = options["init_args"]
    given["questions"], given["test_questions"] = str(world / "train.jsonl"), str(world / "test.jsonl")
    given["retriever"]["init_args"] = {"corpus": str(world / "corpus.jsonl"), "index": str(world / "index")}
    return options


def warm_up(root: Path, environment: dict[str, Any]) -> Path:
    """The folder of the policy that every run starts from."""
    export = root / "aimless" / "export"
    if (export / "model.safetensors").exists():
        return export
    world = root / "world"
    write_world(world)
    given = dict(environment["init_args"])
    given["retriever"] = BM25Retriever(**given["retriever"]["init_args"])
    suite = SearchSuite(**given)
    write_aimless_plays(root / "aimless.jsonl", suite, world)
    base = build_policy(root / "base", suite, world)
    solutions = {"class_path": "Walkthroughs", "init_args": {"environment": environment, "num_tasks": 576}}
    supervised(root / "solutions", base, solutions, 2e-3)
    aimless = {"class_path": "JSONLConversations", "init_args": {"path": str(root / "aimless.jsonl")}}
    supervised(root / "aimless", root / "solutions" / "export", aimless, 5e-4)
    return export


def supervised(folder: Path, pretrained: Path, source: dict[str, Any], lr: float) -> None:
    """Train `pretrained` on conversations; the policy lies in `folder/export`."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}}
    module = {"class_path": "SFTModule", "init_args": {"pretrained": str(pretrained), "optimizer": optimizer}}
    given = {"source": source, "chat": "inline", "batch_size": 16, "max_length": 320, "max_tokens": 8192}
    data = {"class_path": "ConversationDataModule", "init_args": given}
    lit_agentrl(
        [
            *("fit", f"--model={json.dumps(module)}", f"--data={json.dumps(data)}"),
            f"--trainer.max_epochs={EPOCHS[folder.name]}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.gradient_clip_val=1.0",
        ]
    )


def comparison(args: argparse.Namespace) -> dict[str, Any]:
    """What `lit-agentrl compare` is given."""
    chain = {
        "model.intra_weight": 0.0,  # the leaves of a prompt are compared, as in GRPO
        "data.rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 4}},
        "data.group_size": 4,
    }
    return {
        "name": "tree_learning",
        "output": str(args.root / "compare"),
        "seeds": args.seeds,
        "budget": {"generated_tokens": args.tokens},
        "metric": "success",
        "baseline": "chain",
        "arms": {
            "tree": {"config": ["arm.yaml"]},
            "inter": {"config": ["arm.yaml"], "options": {"model.intra_weight": 0.0}},
            "chain": {"config": ["arm.yaml"], "options": chain},
        },
        "options": {"evaluation.every_n_epochs": 2},
    }


def lit_agentrl(words: list[str]) -> None:
    """Run a command in a process of its own, with one thread."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([sys.executable, "-m", "lit_agentrl", *words], check=True, env=environment)


if __name__ == "__main__":
    main()
