"""FSDP2 on two gloo ranks trains as one process does, whatever else is asked for; what cannot work is refused first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from lit_agentrl.methods import DPOModule, GRPOPlusPlusModule, SFTModule
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.methods.strategy_checks import check_strategy
from lit_agentrl.models.policy import Lora, Vision
from lit_agentrl.models.reference import Reference
from lit_agentrl.strategies import FSDP2Strategy
from preference_parts import dpo_options, echo_pairs, write_pairs
from rank_runs import FSDP2, outputs, run_ranks
from runs import checkpoint, metrics, options
from tiny import build_tiny_lm

SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5")
"""Linear in the gradient: AdamW would magnify the rounding of gradients near zero."""
UNEVEN = ("--data.num_prompts", "3", "--data.max_tokens", "256", "--data.num_passes", "2")
"""Rank 0 has two prompts, rank 1 one; several micro-batches, several optimiser steps."""
FULL = ("--model.lora", "null")
KL = ("--model.kl_coef", "0.1", "--model.reference.mode")
CASES: dict[str, tuple[str, ...]] = {
    "adapter": (),
    "all weights": FULL,
    "clipped by norm": (*FULL, "--trainer.gradient_clip_val", "0.01"),
    "clipped by value": (
        *(*FULL, "--trainer.gradient_clip_val", "0.001"),
        *("--trainer.gradient_clip_algorithm", "value"),
    ),
    "checkpointed": (*FULL, "--model.gradient_checkpointing", "true"),
    "checkpointed adapter": ("--model.gradient_checkpointing", "true"),
    "frozen": (*FULL, *KL, "frozen"),
    "sync": (*FULL, *KL, "sync", "--model.reference.sync_every", "1"),
    "ema": (*FULL, *KL, "ema", "--model.reference.decay", "0.5"),
    "adapter off": (*KL, "adapter_off"),
    "recomputed": ("--model.old_logprobs", "recompute", "--data.num_updates", "1"),
    "offloaded": (*FULL, "--trainer.strategy.cpu_offload", "true"),
    "kept gathered": (*FULL, "--trainer.strategy.reshard_after_forward", "false"),
}
ALONE = {name: tuple(more) for name, more in CASES.items() if name not in ("offloaded", "kept gathered")}
"""What one process can be asked for."""


def runs_of(lm: str, root: Path, pairs: Path) -> dict[str, Callable[..., list[str]]]:
    """All runs by name: given a folder and more options, their command lines."""

    def grpo(name: str, more: tuple[str, ...]) -> Callable[..., list[str]]:
        return lambda where, *extra: options(lm, root / where / name, *UNEVEN, *SGD, *extra, *more)

    def dpo(name: str, *more: str) -> Callable[..., list[str]]:
        return lambda where, *extra: dpo_options(lm, root / where / name, pairs, *SGD, *extra, *more)

    made = {name: grpo(name, more) for name, more in CASES.items()}
    return made | {"dpo": dpo("dpo", *FULL), "dpo precomputed": dpo("dpo precomputed", "--model.precompute", "true")}


@pytest.fixture(scope="module")
def trained(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of one process under `one`, and the same of two ranks under `two`, by one start of the processes."""
    root = tmp_path_factory.mktemp("strategies")
    pairs = write_pairs(root / "pairs.jsonl", echo_pairs())
    runs = runs_of(tiny_lm, root, pairs)
    run_ranks([make("two", *FSDP2) for make in runs.values()])
    for name, make in runs.items():
        if name in ALONE or "dpo" in name:
            main(make("one"))
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint(run)["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "dpo", "dpo precomputed"])
def test_two_sharded_ranks_train_as_one(trained: Path, tiny_lm: str, name: str) -> None:
    """Evaluation before and after, two iterations of two optimiser steps, export: all of it."""
    alone = trained / "one" / (name if name in ALONE or "dpo" in name else "all weights")
    one, two = weights(alone), weights(trained / "two" / name)
    assert one.keys() == two.keys()
    assert_close(two, one, rtol=1e-3, atol=1e-4)
    start = AutoModelForCausalLM.from_pretrained(tiny_lm).state_dict()
    moved = [float((value - start.get(key.removeprefix("policy.lm."), 0.0)).abs().max()) for key, value in two.items()]
    assert max(moved) > 1e-3
    exported, expected = (AutoModelForCausalLM.from_pretrained(run / "export") for run in (trained / "two" / name, alone))
    assert_close(exported.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)
