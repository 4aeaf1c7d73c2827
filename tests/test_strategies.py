"""FSDP2 on two gloo ranks trains as one process does, whatever else is asked for; what cannot work is refused first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from lit_agentrl.methods import DPOModule, GRPOPlusPlusModule, SFTModule
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.methods.strategy_checks import check_strategy
from lit_agentrl.models.policy import Lora, Vision
from lit_agentrl.models.reference import Reference
from lit_agentrl.strategies import FSDP2Strategy
from preference_parts import dpo_options, echo_pairs, mining_options, write_pairs
from rank_runs import FSDP2, run_ranks
from runs import checkpoint, metrics, options

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
    "half": (*FULL, "--trainer.precision", "bf16-mixed"),
    "recomputed": ("--model.old_logprobs", "recompute", "--data.num_updates", "1"),
    "offloaded": (*FULL, "--trainer.strategy.cpu_offload", "true"),
    "kept gathered": (*FULL, "--trainer.strategy.reshard_after_forward", "false"),
}
LIKE_ALL = ("offloaded", "kept gathered", "half")
"""What changes nothing but memory, time and rounding: compared with `all weights` of one process, or of two ranks."""


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
        if name not in LIKE_ALL:
            main(make("one"))
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint(run)["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in CASES if name != "half"), "dpo", "dpo precomputed"])
def test_two_sharded_ranks_train_as_one(trained: Path, tiny_lm: str, name: str) -> None:
    """Evaluation before and after, two iterations of two optimiser steps, export: all of it."""
    alone = trained / "one" / ("all weights" if name in LIKE_ALL else name)
    one, two = weights(alone), weights(trained / "two" / name)
    assert one.keys() == two.keys()
    assert_close(two, one, rtol=1e-3, atol=1e-4)
    start = AutoModelForCausalLM.from_pretrained(tiny_lm).state_dict()
    moved = [float((value - start.get(key.removeprefix("policy.lm."), 0.0)).abs().max()) for key, value in two.items()]
    assert max(moved) > 5e-4
    if "clipped" in name:
        whole = weights(trained / "one" / "all weights")
        assert max(float((value - whole[key]).abs().max()) for key, value in one.items()) > 1e-4, "it was clipped"
    exported, expected = (
        AutoModelForCausalLM.from_pretrained(run / "export") for run in (trained / "two" / name, alone)
    )
    assert_close(exported.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_half_precision_computes_and_float32_is_kept(trained: Path) -> None:
    """bf16-mixed: masters, moments and checkpoint stay float32; the loss is float32's within bfloat16's rounding."""
    exact, rounded = trained / "two" / "all weights", trained / "two" / "half"
    assert {value.dtype for value in weights(rounded).values()} == {torch.float32}
    losses = [
        [float(row["train/entropy"]) for row in metrics(run) if row.get("train/entropy")] for run in (exact, rounded)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


# --- other commands and strategies ------------------------------------------------------------------------------------

SPEAKS = ("--data.canary", "null")
"""The engine that mining is tested with says words of its own, which the canary would notice."""
UNUSED = ("--trainer.strategy", "ddp_find_unused_parameters_true", "--trainer.devices", "2")
PLAIN = '{"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, '
PLAIN += '"save_distributed_checkpoint": false}}'


def evaluation(lm: str, run: Path, *more: str) -> list[str]:
    _, *rest = options(lm, run, *more, "--evaluation.num_tasks", "3")
    return ["evaluate", *rest]


@pytest.fixture(scope="module")
def commands(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation, mining, and fits by strategies that were not made for this, on two ranks and on one."""
    root = tmp_path_factory.mktemp("commands")

    def made(where: str, *more: str) -> list[list[str]]:
        folder = root / where
        return [
            evaluation(tiny_lm, folder / "evaluate", *more),
            mining_options(tiny_lm, folder / "mine", *more, *SPEAKS),
        ]

    plain = ("--trainer.strategy", PLAIN, "--trainer.devices", "2")
    fits = [options(tiny_lm, root / name, *UNEVEN, *SGD, *how) for name, how in (("unused", UNUSED), ("plain", plain))]
    run_ranks([*made("two", *FSDP2), *fits])
    for command in (*made("one"), options(tiny_lm, root / "alone", *UNEVEN, *SGD)):
        main(command)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unused", "plain"])
def test_other_strategies_train_as_one(commands: Path, name: str) -> None:
    assert_close(weights(commands / name), weights(commands / "alone"), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_evaluation_and_mining_give_what_one_process_does(commands: Path) -> None:
    records = []
    for where in ("one", "two"):
        (line,) = (commands / where / "evaluate" / "evaluation.jsonl").read_text().splitlines()
        records.append(json.loads(line)["metrics"])
    assert records[0] == records[1]
    assert records[0]["num_tasks"] == 3
    one, two = ((commands / where / "mine" / "preferences.jsonl").read_bytes() for where in ("one", "two"))
    assert one == two
    assert one.count(b"\n") > 3


def test_the_doctor_takes_one_rank(tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, *rest = options(tiny_lm, tmp_path, *FSDP2, "--repeats", "1", "--seconds", "5")
    main(["doctor", *rest])
    shown = capsys.readouterr().out
    assert "trainer.devices: 2 -> 1" in shown
    assert "FSDP2Strategy" in shown
    assert "-> auto" in shown


# --- refused ----------------------------------------------------------------------------------------------------------


class FakeTrainer:
    """What the checks look at."""

    def __init__(self, strategy: Any, **more: Any) -> None:
        self.strategy = strategy
        self.datamodule, self.precision, self.world_size = more.get("datamodule"), more.get("precision", "32-true"), 2
        self.gradient_clip_val, self.gradient_clip_algorithm = more.get("clip"), more.get("algorithm")


class Sampling:
    """A datamodule that collects rollouts."""

    engine = object()


def fsdp1(**more: Any) -> FSDPStrategy:
    return FSDPStrategy(**more)


@pytest.mark.parametrize(
    ("strategy", "trainer", "module", "named"),
    [
        ({}, {"datamodule": Sampling()}, GRPOPlusPlusModule(pretrained="x"), "Sampling samples from the policy"),
        ({}, {"clip": 1.0}, SFTModule("x"), "gradient_clip_val=1.0 clips by norm"),
        ({}, {"clip": 1.0, "algorithm": "norm"}, SFTModule("x"), "clips by norm"),
        ({}, {}, DPOModule(pretrained="x"), "reference policy"),
        ({"use_orig_params": False}, {}, SFTModule("x", lora=Lora()), "use_orig_params=false"),
        ({}, {}, SFTModule("x", lora=Lora(), quantize="nf4"), "quantize=nf4"),
        ({}, {}, SFTModule("x", vision=Vision(tower="trained")), "vision"),
    ],
)
def test_what_fsdp1_cannot_do_is_refused(
    strategy: dict[str, Any], trainer: dict[str, Any], module: LanguageModule, named: str
) -> None:
    with pytest.raises(UserError, match=named) as refusal:
        check_strategy(FakeTrainer(fsdp1(**strategy), **trainer), module)
    assert "fsdp2.yaml" in str(refusal.value)
    assert str(refusal.value).count(";") == 0, "that alone"


@pytest.mark.parametrize(
    "module",
    [
        SFTModule("x"),
        SFTModule("x", lora=Lora()),
        DPOModule(pretrained="x", losses={"simpo": 1.0}),
        DPOModule(pretrained="x", losses={"orpo": 1.0}, reference=Reference("none")),
    ],
)
def test_what_fsdp1_can_do_is_let_through(module: LanguageModule) -> None:
    """Clipping by value, too. Whether it then trains was never seen: it needs GPUs."""
    check_strategy(FakeTrainer(fsdp1(), clip=0.1, algorithm="value"), module)


def test_fsdp1_wraps_the_layers(tiny_lm: str) -> None:
    """Unless its own options say what is wrapped."""
    strategies = [fsdp1(), fsdp1(auto_wrap_policy={torch.nn.Linear})]
    for strategy in strategies:
        module = SFTModule(tiny_lm)
        module._trainer = FakeTrainer(strategy)
        module.configure_model()
    policies = [strategy.kwargs["auto_wrap_policy"]._module_classes for strategy in strategies]
    assert policies == [{LlamaDecoderLayer}, {torch.nn.Linear}]


def test_all_reasons_are_named_at_once() -> None:
    trainer = FakeTrainer(fsdp1(), clip=1.0, datamodule=Sampling())
    with pytest.raises(UserError, match="samples from the policy; gradient_clip_val"):
        check_strategy(trainer, GRPOPlusPlusModule(pretrained="x"))


def sharded(tensor_parallel: int, strategy: type[ModelParallelStrategy] = FSDP2Strategy) -> ModelParallelStrategy:
    made = strategy()
    made._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}
    return made


@pytest.mark.parametrize(
    ("trainer", "module", "message"),
    [
        (FakeTrainer(sharded(1)), SFTModule("x", lora=Lora(), quantize="nf4"), "cannot be sharded.*strategy ddp"),
        (FakeTrainer(sharded(1), precision="16-mixed"), SFTModule("x"), "Use bf16-mixed"),
        (
            FakeTrainer(sharded(2, ModelParallelStrategy)),
            SFTModule("x"),
            "tensor_parallel_size is 2: its default, auto, .*data_parallel_size: 2, tensor_parallel_size: 1",
        ),
    ],
)
def test_what_fsdp2_cannot_do_is_refused(trainer: FakeTrainer, module: LanguageModule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_strategy(trainer, module)


def test_fsdp1_needs_a_gpu(tiny_lm: str, tmp_path: Path) -> None:
    """Lightning says so itself, before anything is loaded."""
    config = Path(__file__).parent.parent / "configs" / "trainer" / "fsdp1.yaml"
    with pytest.raises(ValueError, match=r"`fsdp` requires a GPU"):
        main(
            options(
                tiny_lm, tmp_path, "--config", str(config), "--trainer.accelerator", "cpu", "--trainer.devices", "1"
            )
        )
