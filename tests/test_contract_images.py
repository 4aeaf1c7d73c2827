"""The contract of a policy that sees: micro-batches, shared prefixes and ranks change nothing of what images teach."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from contract_parts import in_this_process, options_of
from lit_agentrl.doctor.contract.processes import in_processes
from lit_agentrl.doctor.contract.recorder import units_of
from lit_agentrl.doctor.contract.run import Contract, check
from lit_agentrl.doctor.contract.text import render
from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.types import TrainBatch
from runs import ROOT
from tiny_vlm import CONFIGS, SHAPES
from vlm_folders import build_vlm_folder

BF16 = ("--trainer.precision", "bf16-mixed")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_vlm_folder(tmp_path_factory.mktemp("vlm") / "vlm", "qwen2_5_vl")


def words(vlm: str, folder: Path, *more: str) -> list[str]:
    """`doctor --contract` where every weight is trained, the tower's too, and each turn shows a picture."""
    model = {"pretrained": vlm, "vision": {"tower": "trained"}, "lora": None}
    data = {
        "environment": {"class_path": "vlm_fits.Slides", "init_args": {"turns": 2}},
        "rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 2, "cut_actions": "continue"}},
        "sampling": {"max_new_tokens": 6},
        **{"num_prompts": 3, "group_size": 3, "max_length": 300, "max_tokens": 8000},
    }
    config = {
        "model": {"class_path": "GRPOPlusPlusModule", "init_args": model},
        "data": {"class_path": "RolloutDataModule", "init_args": data},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["doctor", "--config", str(path), "--trainer.accelerator", "cpu", "--contract", "true", *more]


def statuses(contract: Contract) -> dict[str, str]:
    """Of the settings that were run."""
    print(render(contract))
    return {o.setting.name: o.status for o in contract.outcomes if o.facts is not None}


def test_in_float64_only_rounding_is_left(vlm, tmp_path, monkeypatch):
    given = options_of(words(vlm, tmp_path, "--model.dtype", "float64"), monkeypatch)
    contract = check(given, 2, in_this_process("split", "packed and shared", "packed, shared, split"))
    assert set(statuses(contract).values()) == {"held"}
    assert all(o.facts.difference.one_minus_cosine < 1e-13 for o in contract.outcomes if o.facts is not None)
    assert contract.baseline.norm > 1e-3


def altered(step: Callable, self: GRPOPlusPlusModule, batch: TrainBatch, index: int) -> Tensor:
    """Rows in micro-batches of their own show other pictures."""
    if len(batch.lengths) == 1:
        pixels = {name: [torch.flip(image, [0]) for image in images] for name, images in batch.vision.pixels.items()}
        pixels["image_grid_thw"] = batch.vision.pixels["image_grid_thw"]
        batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, pixels=pixels))
    return step(self, batch, index)


def heavier(step: Callable, self: GRPOPlusPlusModule, batch: TrainBatch, index: int) -> Tensor:
    """One of nine micro-batches counts a tenth more."""
    return step(self, batch, index) * (1.1 if len(batch.lengths) == 1 and index == 0 else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [altered, heavier])
def test_what_is_wrong_is_found_in_16_bits(vlm, tmp_path, monkeypatch, wrong):
    step = GRPOPlusPlusModule.training_step
    given = options_of(words(vlm, tmp_path, *BF16), monkeypatch)
    monkeypatch.setattr(GRPOPlusPlusModule, "training_step", lambda *args: wrong(step, *args))
    found = statuses(check(given, 2, in_this_process("split", "packed and shared", "in float32")))
    assert found == {"split": "violated", "packed and shared": "held"}


@pytest.mark.slow
def test_all_settings_hold_in_16_bits(vlm, tmp_path, monkeypatch):
    """Real processes: one, two ranks under DDP, one and two under FSDP2."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    contract = check(options_of(words(vlm, tmp_path, *BF16), monkeypatch), 2, in_processes)
    assert len(statuses(contract)) == 11
    assert contract.is_kept
    assert set(statuses(contract).values()) == {"held"}


def test_rows_with_other_pictures_are_other_rows():
    shown = SHAPES["group"]("qwen2_5_vl")
    zeros, vision = torch.zeros(shown.token_ids.shape), shown.vision(CONFIGS["qwen2_5_vl"]())
    batch = TrainBatch(shown.token_ids, shown.lengths, shown.targets, zeros, zeros, 1, vision=vision)
    other = dataclasses.replace(vision, content_ids=[key + 1 for key in vision.content_ids])
    pairs = list(zip(units_of(batch), units_of(dataclasses.replace(batch, vision=other)), strict=True))
    assert pairs
    assert all(one[0] != two[0] and one[1:] == two[1:] for one, two in pairs)
