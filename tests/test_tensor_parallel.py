"""Matrices split over two ranks: the same rows, the same numbers as in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_agentrl import distributed
from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from lit_agentrl.methods import SFTModule
from lit_agentrl.methods.strategy_checks import check_strategy
from lit_agentrl.models import PaddedModel, PrefixGroupedModel
from lit_agentrl.models.policy import Lora, Vision
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.models.tensor_parallel import planned
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import SamplingParams
from prefix_cases import CONFIGS, SHAPES, build_lm
from rank_runs import run_ranks
from runs import checkpoint, metrics, options
from scoring_twins import lora
from test_strategies import FULL, KL, SGD, UNEVEN, FakeTrainer, sharded
from tiny import build_tiny_lm

SPLIT = '{"class_path": "FSDP2Strategy", "init_args": {"tensor_parallel_size": 2}}'
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
"""Plain; biases and tied embeddings; norms of heads; those, and sliding windows."""

# --- the model alone --------------------------------------------------------------------------------------------------


def step(model: PaddedModel, shape: str) -> Tensor:
    """Gradients of the mean log-probability; the log-probabilities [B, L] without."""
    token_ids, lengths, targets = SHAPES[shape]()
    logprobs: Tensor = model(token_ids, lengths, targets=targets).logprobs
    (logprobs.sum() / targets.sum()).backward()  # type: ignore[no-untyped-call]
    return logprobs.detach()


def compare(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    for name in FAMILIES:
        alone, lm = build_lm(CONFIGS[name]()), build_lm(CONFIGS[name]())
        policy = PrefixGroupedModel(lm, min_reuse=0)
        shard(policy, mesh["data"], Sharding(), tensor_parallel=mesh["tensor"])
        for shape in ("tree", "multi_turn"):
            alone.zero_grad()
            policy.zero_grad()
            expected = step(PaddedModel(alone, check=False), shape)
            assert_close(step(policy, shape), expected, rtol=0, atol=1e-12)
            assert not policy.refusal
            for (place, ours), theirs in zip(lm.named_parameters(), alone.parameters(), strict=True):
                assert isinstance(ours.grad, DTensor)
                assert theirs.grad is not None
                assert_close(
                    ours.grad.full_tensor(), theirs.grad, rtol=0, atol=1e-6, msg=lambda m, n=place: f"{n}: {m}"
                )
        halved = [p for p in lm.parameters() if isinstance(p, DTensor) and p.to_local().numel() * 2 == p.numel()]
        assert len(halved) >= 7 * len(lm.get_decoder().layers)
        check_samples(policy, alone)
    check_teams(rank, mesh)
    dist.destroy_process_group()


def check_samples(policy: PaddedModel, alone: torch.nn.Module) -> None:
    """The engine's copy is whole: it answers as the model does."""
    engine, expected = HFEngine(stop_token_ids=[]), HFEngine(stop_token_ids=[])
    engine.sync(policy)
    expected.sync(alone)
    words, sampling = [[5, 6, 7, 8], [5, 6, 9]], SamplingParams(max_new_tokens=5)
    found, theirs = (each.generate(words, sampling, seeds=[1, 2]) for each in (engine, expected))
    assert [each.token_ids for each in found] == [each.token_ids for each in theirs]


def check_teams(rank: int, mesh: dist.device_mesh.DeviceMesh) -> None:
    """Ranks of a team count once; what one is asked for comes from its first rank."""
    assert distributed.share() == (rank, 2)
    assert distributed.reduce_integers([rank + 1]) == [3]
    distributed.set_team(mesh["tensor"].get_group())
    assert distributed.share() == (0, 1)
    assert distributed.is_leader() == (rank == 0)
    assert distributed.reduce_integers([rank + 1]) == [1]
    assert distributed.reduce_integers([rank + 1], "max") == [2]
    assert distributed.reduce_floats([0.5]) == [0.5]
    assert distributed.gather(rank) == [0]
    assert distributed.from_leader(lambda: rank) == 0

    def fail() -> None:
        raise ValueError("no such task")

    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="no such task"):
        distributed.from_leader(fail)
    distributed.set_team(None)
    assert distributed.from_leader(lambda: rank) == rank


@pytest.mark.slow
def test_a_split_decoder_computes_what_a_whole_one_does(tmp_path: Path) -> None:
    mp.spawn(compare, (str(tmp_path / "store"),), nprocs=2)


def with_plan(plan: dict[str, str]) -> torch.nn.Module:
    lm = build_lm(CONFIGS["llama"]())
    lm.config.base_model_tp_plan = plan
    return lm


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (lambda: lora(build_lm(CONFIGS["llama"]()), target_modules="all-linear"), 2, "without adapter"),
        (lambda: build_lm(CONFIGS["llama"]()), 3, "cannot be divided by 3"),
        (lambda: with_plan({}), 2, "transformers has a plan for"),
        (lambda: with_plan({"layers.*.mlp": "moe_tp_experts"}), 2, "its plan has moe_tp_experts, which is not"),
    ],
)
def test_what_cannot_be_split_is_refused(make: Callable[[], torch.nn.Module], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(make(), size)


@pytest.mark.parametrize(
    "module",
    [SFTModule("x", lora=Lora()), SFTModule("x", vision=Vision(tower="trained")), SFTModule("x", compile=True)],
)
def test_what_is_not_split_is_refused_before_loading(module: SFTModule) -> None:
    with pytest.raises(UserError, match=r"tensor_parallel_size=2 with (lora|vision|compile)"):
        check_strategy(FakeTrainer(sharded(2)), module)


# --- whole runs -------------------------------------------------------------------------------------------------------

CASES = {
    "plain": (),
    "clipped": ("--trainer.gradient_clip_val", "0.01"),
    "checkpointed": ("--model.gradient_checkpointing", "true"),
    "parts": ("--model.optimizer.momentum", "0.9"),
    "kl": (*KL, "sync", "--model.reference.sync_every", "1"),
}
TIED = {"tied": "qwen2", "head norms": "qwen3"}


def command(lm: str, run: Path, *more: str) -> list[str]:
    return options(lm, run, *UNEVEN, *SGD, *FULL, *more)


@pytest.fixture(scope="module")
def trained(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("split")
    lms = {name: build_tiny_lm(root / family, family, tie_word_embeddings=True) for name, family in TIED.items()}
    runs = {name: (tiny_lm, more) for name, more in CASES.items()} | {name: (lm, ()) for name, lm in lms.items()}
    runs["parts"] = lms["tied"], CASES["parts"]
    two = ("--trainer.strategy", SPLIT, "--trainer.devices", "2")
    commands = [command(lm, root / "two" / name, *more, *two) for name, (lm, more) in runs.items()]
    (whole,) = (words for words in commands if str(root / "two" / "parts") in words)
    commands.remove(whole)
    commands += [[*whole, "--trainer.max_epochs", "1"], [*whole, "--ckpt_path", "last"]]
    run_ranks(commands)
    for name, (lm, more) in runs.items():
        main(command(lm, root / "one" / name, *more))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *TIED])
def test_a_team_trains_as_one_process(trained: Path, name: str) -> None:
    """Both ranks train on the same rows, and what is logged counts them once; `parts` was stopped and resumed."""
    alone, team = (trained / where / name for where in ("one", "two"))
    one, two = checkpoint(alone), checkpoint(team)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert_close(two["state_dict"], one["state_dict"], rtol=1e-3, atol=1e-4)
    assert (
        one["RolloutDataModule"]["totals"]["generated_tokens"] == two["RolloutDataModule"]["totals"]["generated_tokens"]
    )
    exported, expected = (AutoModelForCausalLM.from_pretrained(run / "export") for run in (team, alone))
    assert_close(exported.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)
    if name != "parts":
        for key in ("train/loss", "train/entropy", "reward/mean"):
            ours, theirs = ([float(row[key]) for row in metrics(run) if row.get(key)] for run in (team, alone))
            assert len(ours) == 2
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
        files = sorted(path.name for path in (team / "transcripts").glob("iteration*"))
        assert files == ["iteration_000000.rank0.jsonl", "iteration_000001.rank0.jsonl"]


@pytest.mark.slow
def test_two_teams_of_two(tiny_lm: str, tmp_path: Path) -> None:
    """Four ranks: sharded over two, split over two."""
    run_ranks([command(tiny_lm, tmp_path / "four", "--trainer.strategy", SPLIT, "--trainer.devices", "4")], size=4)
    main(command(tiny_lm, tmp_path / "one"))
    assert_close(
        checkpoint(tmp_path / "four")["state_dict"], checkpoint(tmp_path / "one")["state_dict"], rtol=1e-3, atol=1e-4
    )
    said = [
        json.loads(line)["prompt_id"]
        for path in (tmp_path / "four" / "transcripts").glob("iteration_000000.*")
        for line in path.read_text().splitlines()
    ]
    assert len(said) == 12, "three prompts, four trajectories each: nobody played one twice"
