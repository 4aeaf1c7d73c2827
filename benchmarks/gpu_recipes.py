"""Recipes of every method on one GPU in bfloat16, with prefix sharing on and off: time by phase, MFU, memory.

Run with CUDA: `python benchmarks/gpu_recipes.py [--trl]`; some recipes alone: `--config RECIPE.yaml ...`. What follows
a bare `--` is given to every run (`-- --data.num_prompts 2`). The tables go to `benchmarks/gpu_recipes.md`, after every
recipe what there is. `--device cpu --quick` runs the same script on a tiny model, to test it.

Each run is the command line's `fit`, in this process, of a recipe's method and rollout (module, strategy, chat mode) on
a random policy in the shape of Qwen3-0.6B with all its weights trained (AdamW, 16-bit states), and on a task whose
prompt is long (`gpu_policy.py`): groups of 8, 3 turns of at most 16 new tokens, one token a byte. SFT and DPO get 32
rows a step of the same rules, and answers of 64 tokens (`gpu_offline.py`). Only `model.share_prefix` differs between
the two runs of a recipe. The reward is the share of even token ids, as random weights earn nothing. The first two
iterations, which compile, are not counted; evaluation, export and checkpoints are off. Phases are what the run logs;
the update ends when the GPU has ended.

`--trl` adds TRL's SFT and DPO on the very same files, and its GRPO by `vs_trl.py` (one turn: its trainer plays no
episodes; Tree-GRPO and GiGPO have no counterpart). A side that fails says so in its row.

Operations: 2 a weight and token in a forward (the head on target tokens alone) and 4 a pair of query and key, head and
value (scores, then the sum); three times that with the backward, and once more for DPO's reference. MFU is what a side
computes over the update's seconds and the peak of an H100 (989 TFLOP/s, dense bfloat16); the rate beside it counts the
padded rows' operations on both sides, as a run without sharing would have to do them in that time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from gpu_offline import ROWS, write_conversations, write_pairs
from gpu_policy import build
from prefix_batches import Work
from prefix_gpu import SHAPES
from prefix_tables import footer, markdown
from sharing_step import logged
from transformers import AutoConfig

from lit_agentrl.cli import main as lit_agentrl
from lit_agentrl.models import PackedTree
from lit_agentrl.types import TrainBatch

HERE = Path(__file__).parent
NAMES = ("grpopp_echo", "tree_grpo_echo", "gigpo_echo", "textworld_warmup", "dpo_echo")
"""One recipe of every method; of the last two the method alone, as they bring their data."""
RECIPES = [HERE.parent / "configs" / "experiment" / f"{name}.yaml" for name in NAMES]
OFFLINE = {"SFTModule": "sft", "DPOModule": "dpo"}
SIDES = {"on": "true", "off": "false"}
PEAK = 989e12
WARM_UP = 2  # iterations
PHASES = ("collect", "prepare", "update", "step")


class Recorder(L.Callback):
    """Writes what every iteration's update had to compute, one JSON line each.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the update, so that counting costs it nothing."""
        loaded = trainer.train_dataloader
        batches: list[TrainBatch] = list(loaded)  # type: ignore[call-overload]
        works = {name: [work(batch, name) for batch in batches] for name in ("padded", "unique")}
        line = {name: [sum(getattr(each, part) for each in of) for part in PARTS] for name, of in works.items()}
        line["rows"] = [sum(int(batch.lengths.sum()) for batch in batches)]
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"micro_batches": len(batches)}) + "\n")


PARTS = ("tokens", "pairs", "targets")


def work(batch: TrainBatch, way: str) -> Work:
    """What one forward of the batch computes."""
    if way == "padded":
        rows, longest = len(batch.lengths), int(batch.lengths.max())
        return Work(rows * longest, rows * longest * (longest + 1) // 2, int(batch.action_mask.sum()))
    tree = PackedTree.build(batch.token_ids, batch.lengths)
    return Work(len(tree), int((tree.positions + 1).sum()), len(tree.unique_targets(batch.action_mask)[0]))


@dataclass(frozen=True)
class Run:
    """The counted iterations of one run."""

    metrics: list[dict[str, float]]
    works: list[dict[str, list[int]]]
    peak: float
    """GiB of the GPU's memory, weights included; 0 on CPU."""
    whole: float
    """Seconds of the process for all of it."""
    module: str
    """The method's class."""

    def seconds(self, phase: str) -> float:
        """The median; SFT and DPO collect nothing and prepare while they update."""
        names = {
            "collect": ["collect"],
            "prepare": ["advantages", "prepare"],
            "update": ["update"],
            "step": ["iteration"] if self.module in OFFLINE else ["collect", "advantages", "prepare", "update"],
        }[phase]
        return statistics.median(sum(metrics.get(f"time/{name}", 0.0) for name in names) for metrics in self.metrics)

    def mean(self, name: str) -> float:
        """Over the iterations."""
        return statistics.mean(metrics[name] for metrics in self.metrics)

    def rate(self, config: object, way: str) -> float:
        """FLOP/s of the update, counting the operations of the padded or of the unique tokens."""
        forwards = 4 if self.module == "DPOModule" else 3
        flops = [forwards * Work(*each[way]).flops(config) for each in self.works]  # type: ignore[arg-type]
        return statistics.mean(flops) / self.seconds("update")


def main() -> None:
    """Run the recipes, print the tables and write them."""
    border = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, passed = sys.argv[1:border], sys.argv[border + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=RECIPES)
    parser.add_argument("--iterations", type=int, default=20, help="of a run, those that warm up included")
    parser.add_argument("--seconds", type=int, default=60, help="a run ends after the iteration that passes them")
    parser.add_argument("--size", choices=SHAPES, default="0.6b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing written by default")
    parser.add_argument("--trl", action="store_true", help="TRL's steps too, where it is installed and has them")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(words)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu is for a test of the script: add --quick.")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU and found none.", file=sys.stderr)
        raise SystemExit(2)
    output = args.output or (None if args.quick else HERE / "gpu_recipes.md")
    sections: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        lm = build(Path(folder) / "lm", args.size, args.quick, torch.float32 if args.quick else torch.bfloat16)
        for recipe in args.config:
            try:
                runs = {side: run(recipe, side, lm, args, passed) for side in SIDES}
                shown = table(runs, AutoConfig.from_pretrained(lm))
                shown += trl_lines(runs["off"], lm, args) if args.trl else []
            except Exception as error:  # the others' minutes are not to be lost with it
                if args.quick:
                    raise
                shown = [f"Failed: `{type(error).__name__}: {str(error)[:300]}`"]
            sections += [f"## {recipe.stem}", "", *shown, ""]
            if output:
                output.write_text(report(sections, args, passed))
    print(report(sections, args, passed))


def trl_lines(ours: Run, lm: str, args: argparse.Namespace) -> list[str]:
    """TRL's step of the same method, in a process of its own; a run of ours without sharing does equal work."""
    if ours.module == "GRPOPlusPlusModule":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.md"
            words = ["vs_trl.py", "--device", "cuda-test" if args.quick else "cuda", "--repeats", "1"]
            error = process([*words, "--output", str(path)])[1]
            return ["", *(error or path.read_text().splitlines()[2:])]
    if ours.module not in OFFLINE:
        return ["", "TRL has no such method."]
    with tempfile.TemporaryDirectory() as folder:
        path = offline_file(ours.module, Path(folder), args.quick)
        words = ["gpu_offline.py", OFFLINE[ours.module], "--weights", lm, "--file", str(path), "--device", args.device]
        done, error = process([*words, "--steps", str(args.iterations)])
    if error:
        return ["", *error]
    found = json.loads(done.partition("RESULT ")[2])
    seconds = statistics.median(found["steps"][WARM_UP - 1 :])
    ratio = seconds / ours.seconds("step")
    peak = f"{found['peak']:.2f} GiB at its peak"
    return ["", f"TRL: {seconds:.3f} s a step, {peak}; **{ratio:.2f}x** the step without sharing."]


def process(words: list[str]) -> tuple[str, list[str]]:
    """What a script beside this one prints, or what to say of its failure."""
    done = subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return "", [f"TRL's side failed: `{last[:300]}`"]
    return done.stdout, []


def offline_file(module: str, folder: Path, quick: bool) -> Path:
    """What SFT or DPO trains on."""
    prompt, answer = (100, 8) if quick else (1400, 64)
    if module == "SFTModule":
        return write_conversations(folder / "conversations.jsonl", prompt, answer)
    return write_pairs(folder / "pairs.jsonl", prompt, answer)


def run(recipe: Path, side: str, lm: str, args: argparse.Namespace, passed: list[str]) -> Run:
    """One run of the command line."""
    gc.collect()
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.jsonl"
        given = Path(folder) / "recipe.yaml"
        config = changed(recipe, side, lm, args, Path(folder), path)
        given.write_text(yaml.safe_dump(config))
        lit_agentrl(["fit", "--config", str(given), *passed])
        works = [json.loads(line) for line in path.read_text().splitlines()]
        metrics = logged(Path(folder))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    counted = slice(WARM_UP, None)
    module = config["model"]["class_path"].rpartition(".")[2]
    found = Run(metrics[counted], works[counted], peak, time.perf_counter() - began, module)
    shown = {phase: round(found.seconds(phase), 3) for phase in PHASES}
    print(recipe.stem, f"sharing {side}:", len(found.metrics), "iterations,", shown, f"{found.whole:.0f} s", flush=True)
    return found


def changed(recipe: Path, side: str, lm: str, args: argparse.Namespace, folder: Path, path: Path) -> dict[str, Any]:
    """The recipe with this benchmark's policy, task and sizes."""
    config: dict[str, Any] = yaml.safe_load(recipe.read_text())
    config["trainer"] |= {
        "max_epochs": args.iterations,
        "max_time": {"seconds": args.seconds},
        "accelerator": "gpu" if args.device == "cuda" else "cpu",
        "devices": 1,
        "precision": "32-true" if args.quick else "bf16-true",
        "default_root_dir": str(folder),
        "gradient_clip_val": 1.0,
        "enable_checkpointing": True,
        "callbacks": [{"class_path": "gpu_recipes.Recorder", "init_args": {"path": str(path)}}],
    }
    model = config["model"]["init_args"]
    model |= {"pretrained": lm, "lora": None, "share_prefix": SIDES[side] == "true"}
    model |= {"dtype": "float32" if args.quick else "bfloat16"}
    model["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}}
    data = config["data"]["init_args"]
    data |= {"max_length": 512 if args.quick else 2304, "max_tokens": 2048 if args.quick else 12_288}
    module = config["model"]["class_path"]
    if module in OFFLINE:
        file = str(offline_file(module, folder, args.quick))
        if module == "SFTModule":
            data |= {"source": {"class_path": "JSONLConversations", "init_args": {"path": file}}, "batch_size": ROWS}
        else:
            data |= {"path": file, "batch_size": ROWS // 2}
    else:
        on_episodes(data, args.quick)
        config["transcripts"] = {"show": 0}
    config["evaluation"] = {"at_start": False, "at_end": False, "num_tasks": 1}
    config["export"] = {"at_end": False}
    config["checkpoint"] = {"every_n_epochs": 100_000}
    return config


def on_episodes(data: dict[str, Any], quick: bool) -> None:
    """The long task in the place of a recipe's own."""
    length = {"prompt": 100, "observation": 20} if quick else {"prompt": 1400, "observation": 128}
    turns, new = (2, 4) if quick else (3, 16)
    data["environment"] = {"class_path": "gpu_policy.LongEchoSuite", "init_args": length | {"turns": turns}}
    data["rollout"].setdefault("init_args", {})["max_steps"] = turns
    data |= {
        "sampling": {"temperature": 1.0, "max_new_tokens": new},
        "rewards": [{"function": "gpu_policy.even_share"}],
        "num_prompts": 2 if quick else 4,
        "num_workers": 8,
    }
    if data["rollout"].get("class_path") == "ChainRollout":
        data["group_size"] = 8
    else:
        data.pop("group_size", None)  # what its trees have


def table(runs: dict[str, Run], config: object) -> list[str]:
    """Rows of both sides, and how many times faster."""
    header = (
        "", *(f"{phase} s" for phase in PHASES), "generated tokens/s", "row tokens/s of the update", "padded tokens",
        "unique tokens", "TFLOP/s computed", "MFU", "TFLOP/s as if padded", "peak GiB", "micro-batches", "iterations",
    )  # fmt: skip
    rows = []
    is_offline = runs["on"].module in OFFLINE
    for side, each in runs.items():
        tokens = {way: statistics.mean(work[way][0] for work in each.works) for way in ("padded", "unique")}
        done, padded = each.rate(config, "unique" if side == "on" else "padded"), each.rate(config, "padded")
        rows.append(
            [
                f"sharing {side}",
                *(f"{each.seconds(phase):.3f}" for phase in PHASES),
                "-" if is_offline else f"{each.mean('tokens/generated') / each.seconds('collect'):.0f}",
                f"{trained(each) / each.seconds('update'):.0f}",
                *(f"{tokens[way]:,.0f}" for way in ("padded", "unique")),
                f"{done / 1e12:.1f}",
                f"{done / PEAK:.1%}",
                f"{padded / 1e12:.1f}",
                f"{each.peak:.2f}",
                f"{statistics.mean(work['micro_batches'] for work in each.works):.1f}",  # type: ignore[type-var]
                str(len(each.metrics)),
            ]
        )
    on, off = runs["on"], runs["off"]
    pairs = [(off.seconds(phase), on.seconds(phase)) for phase in PHASES]
    times = [f"**{slow / fast:.2f}x**" if fast else "-" for slow, fast in pairs]
    memory = f"{off.peak / on.peak:.2f}x" if on.peak else ""
    rows.append(["off over on", *times, *[""] * 7, memory, "", ""])
    return markdown(header, rows)


def trained(run: Run) -> float:
    """Tokens of an iteration's rows, without padding."""
    return statistics.mean(each["rows"][0] for each in run.works)


def report(sections: list[str], args: argparse.Namespace, passed: list[str]) -> str:
    """All tables with their machine."""
    extra = f" -- {' '.join(passed)}" if passed else ""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    lines = [
        "# Recipes on one GPU" if not args.quick else "# A test of the script",
        "",
        f"`python benchmarks/gpu_recipes.py --iterations {args.iterations}{extra}`, which says what is measured.",
        f"Policy: random weights in the shape of Qwen3-{args.size}, bfloat16. Medians over the counted iterations;",
        "unique tokens are those of the side's own micro-batches.",
        "",
        *sections,
        f"{device}. {footer(torch.get_num_threads(), 'lightning')}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
