"""Trained vision parts under FSDP2: a rank that sees no picture takes part in what the others reduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from lit_agentrl.cli import main
from lit_agentrl.models import PaddedModel
from lit_agentrl.models.policy import Lora, Vision, load_policy
from lit_agentrl.models.vision_parts import seeing_weights
from rank_runs import FSDP2, run_ranks
from runs import checkpoint
from vlm_folders import build_vlm_folder

KINDS: dict[str, dict[str, Any]] = {
    "whole": {"vision": {"tower": "trained"}},
    "adapter": {"vision": {"tower": "lora", "connector": "trained"}, "lora": {"r": 4, "alpha": 8}},
}
NAMES = ("qwen2_5_vl", "smolvlm", "llava_dino")
RUNS = [*((name, "whole") for name in NAMES), ("qwen2_5_vl", "adapter")]


def command(vlm: str, root: Path, where: str, kind: str) -> list[str]:
    """`fit` on two prompts, of which one shows a picture: two iterations of three answers each."""
    config = {
        "model": {
            "class_path": "GRPOPlusPlusModule",
            "init_args": {
                "pretrained": vlm,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
                **KINDS[kind],
            },
        },
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "environment": {"class_path": "rank_suites.OneSlide"},
                "rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 1, "cut_actions": "continue"}},
                "rewards": [{"function": "runs.mean_token"}],
                "sampling": {"max_new_tokens": 4},
                **{"num_prompts": 2, "group_size": 3, "max_length": 120, "max_tokens": 250},
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "evaluation": {"num_tasks": 2},
        "transcripts": {"show": 0},
    }
    run = root / where / f"{Path(vlm).name}_{kind}"
    file = root / f"{Path(vlm).name}_{kind}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(file), "--trainer.default_root_dir", str(run)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vlms")
    vlms = {name: build_vlm_folder(root / name, name) for name in NAMES}
    run_ranks([[*command(vlms[name], root, "two", kind), *FSDP2] for name, kind in RUNS])
    for name, kind in RUNS:
        main(command(vlms[name], root, "one", kind))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_two_sharded_ranks_train_as_one(trained: Path, name: str, kind: str) -> None:
    one, two = (checkpoint(trained / where / f"{name}_{kind}")["state_dict"] for where in ("one", "two"))
    assert_close(two, one, rtol=1e-3, atol=1e-5)
    seeing = {key: value for key, value in two.items() if ".visual." in key or "vision" in key}
    lm = load_policy(str(trained / name)).state_dict()
    moved = {
        key: float((value - lm.get(key.removeprefix("policy.lm."), torch.zeros(()))).abs().max())
        for key, value in seeing.items()
        if "lora_A" not in key
    }
    assert max(moved.values()) > 1e-4, "the tower did learn, from what one rank saw"


@pytest.mark.parametrize("kind", KINDS)
def test_text_gives_the_tower_gradients_of_zero(tmp_path: Path, kind: str) -> None:
    """Not none, whether padded or shared; and values are those of the model alone."""
    options: dict[str, Any] = {"whole": {"vision": Vision(tower="trained")}}.get(
        kind, {"vision": Vision(tower="lora"), "lora": Lora(r=2)}
    )
    lm = load_policy(build_vlm_folder(tmp_path / "vlm", "qwen2_5_vl"), **options)
    policy = PaddedModel(lm)
    rows, lengths = torch.tensor([[4, 5, 6, 7]]), torch.tensor([4])
    found = policy(rows, lengths).logprobs
    found.sum().backward()
    expected = lm(input_ids=rows).logits.log_softmax(-1)[0, :-1].gather(-1, rows[0, 1:, None])[:, 0]
    assert_close(found[0, 1:].detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    seen = [module.get_parameter(name).grad for module, name in seeing_weights(lm)]
    assert len(seen) > 10
    assert all(grad is not None and not grad.any() for grad in seen)
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)
    with torch.no_grad():
        assert not policy(rows, lengths).logprobs.requires_grad


def test_text_models_have_nothing_that_sees(tiny_lm: str) -> None:
    assert seeing_weights(load_policy(tiny_lm)) == []
