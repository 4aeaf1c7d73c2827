"""Preference files and small runs on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_agentrl.cli import main
from runs import ROOT, checkpoint

DPO = str(ROOT / "configs" / "experiment" / "dpo_echo.yaml")
WORDS = ("bade", "figo", "kula", "meni", "poru", "dego", "lafi")


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    """One line of a preference file."""
    return {
        "prompt": [{"role": "system", "content": "Answer with one word."}, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }


def echo_pairs(number: int = 7) -> list[dict[str, Any]]:
    """The word that was asked for, against longer and shorter ones."""
    words = [WORDS[i % 7] + "x" * (i // 7) for i in range(number)]
    return [pair(f"Say the word: {word}", word, word[::-1] + "?" * (i % 4)) for i, word in enumerate(words)]


def write_pairs(path: Path, pairs: Sequence[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(each) + "\n" for each in pairs))
    return path


def dpo_options(lm: str, run: Path, data: Path, *more: str) -> list[str]:
    """`fit` on the file with the tiny model: two epochs of two optimiser steps."""
    small = {
        "trainer.max_epochs": "2",
        "trainer.default_root_dir": str(run),
        "trainer.accelerator": "cpu",
        "model.pretrained": lm,
        "model.optimizer.lr": "3e-3",
        "data.path": str(data),
        "data.batch_size": "4",
    }
    return ["fit", "--config", DPO, *(w for k, v in small.items() for w in (f"--{k}", v)), *more]


def fit_pairs(lm: str, run: Path, data: Path, *more: str) -> dict[str, Any]:
    """Fit in this process; gives the last checkpoint."""
    main(dpo_options(lm, run, data, *more))
    return checkpoint(run)
