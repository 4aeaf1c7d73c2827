"""Files of conversations and pairs for `gpu_recipes.py`, and TRL's SFT and DPO steps on the very same files.

Run by `gpu_recipes.py --trl`, in a process of its own: `python benchmarks/gpu_offline.py sft --weights FOLDER --file
FILE --steps 20`. Same policy, rows, optimiser, micro-batches and precision; the step is what lies between the ends of
two optimiser steps, its data included, read when the GPU has ended.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_policy import filled

from lit_agentrl.envs.toy import WORDS

ROWS = 32
"""Of an optimiser step: conversations, or answers of half as many pairs."""


def write_conversations(path: Path, prompt: int, answer: int) -> Path:
    """One line a row: long rules, which are the same for all, and a word to say."""
    lines = [{"messages": [_user(number, prompt), _answer(number, answer)]} for number in range(ROWS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_pairs(path: Path, prompt: int, answer: int) -> Path:
    """One line a pair."""
    lines = [
        {
            "prompt": [_user(number, prompt)],
            "chosen": [_answer(number, answer)],
            "rejected": [_answer(number + 1, answer)],
        }
        for number in range(ROWS // 2)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _user(number: int, length: int) -> dict[str, str]:
    return {"role": "user", "content": f"{filled('', length)} {number}: say {WORDS[number % len(WORDS)]}."}


def _answer(number: int, length: int) -> dict[str, str]:
    return {"role": "assistant", "content": filled(f"{number}: {WORDS[number % len(WORDS)]}. ", length)}


def main() -> None:
    """Train by TRL and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("sft", "dpo"))
    parser.add_argument("--weights", required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    trainer = trainer_of(args)
    clock = clock_of(args.device)
    trainer.add_callback(clock)
    trainer.train()
    on_gpu = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    print("RESULT " + json.dumps({"steps": clock.seconds, "peak": peak}))


def trainer_of(args: argparse.Namespace) -> Any:
    """TRL's, with an epoch a step."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.weights)
    lm = AutoModelForCausalLM.from_pretrained(args.weights, dtype=dtype)
    data = load_dataset("json", data_files=args.file, split="train")
    per_micro = args.rows if args.method == "sft" else args.rows // 2
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": args.steps,
        "per_device_train_batch_size": per_micro,
        "gradient_accumulation_steps": len(data) // per_micro,
        "learning_rate": 1e-6,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": None,
        "bf16": on_gpu,
        "fp16": False,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if args.method == "dpo":
        return DPOTrainer(lm, args=DPOConfig(**options), train_dataset=data, processing_class=tokenizer)
    data = data.map(lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]})
    data = data.remove_columns("messages")  # a prompt and its completion: the loss lies on the completion
    return SFTTrainer(lm, args=SFTConfig(**options), train_dataset=data, processing_class=tokenizer)


def clock_of(device: str) -> Any:
    """A callback that reads the clock after every optimiser step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._last = 0.0

        def on_step_end(self, *_: object, **__: object) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self._last:
                self.seconds.append(now - self._last)
            self._last = now

    return Clock()


if __name__ == "__main__":
    main()
