"""Two ranks with FSDP2 train as one process does, through the tree as through padded rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lit_agentrl.models import PaddedModel, PrefixGroupedModel, plan_packs
from lit_agentrl.models.compiled import compile_layers
from lit_agentrl.models.lm_parts import decoder_of
from prefix_cases import CONFIGS, SHAPES, build_lm
from scoring_twins import lora

RANK_SHAPES = ("tree", "multi_turn")  # each rank has rows of its own
PACKS = {"tree": 34, "multi_turn": 25}  # budgets that make two packs of either: ranks step together


def step(model: PaddedModel, shape: str, in_packs: bool) -> Tensor:
    """Gradients of the mean log-probability, and the log-probabilities [B, L] without gradients."""
    token_ids, lengths, targets = SHAPES[shape]()
    packs = plan_packs(token_ids, lengths, PACKS[shape]) if in_packs else [list(range(len(lengths)))]
    assert len(packs) == 1 + in_packs
    logprobs = torch.zeros(token_ids.shape, dtype=torch.float64)
    for pack in packs:
        found = model(token_ids[pack], lengths[pack], targets=targets[pack]).logprobs
        (found.sum() / targets.sum()).backward()
        logprobs[pack] = found.detach()
    return logprobs


def run_rank(rank: int, store: str) -> None:
    """One start of the processes serves all cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(RANK_SHAPES))
    compare(rank, "qwen2", with_checkpointing=True)  # tied weights, replayed layers
    compare(rank, "gemma3", in_packs=True)  # sliding windows
    compare(rank, "qwen3", with_lora=True)
    compare(rank, "llama", with_lora=True, with_checkpointing=True, in_packs=True)
    compare(rank, "llama", with_compiling=True)
    dist.destroy_process_group()


def build(name: str, with_lora: bool) -> nn.Module:
    lm: nn.Module = build_lm(CONFIGS[name]())
    return lora(lm, target_modules="all-linear") if with_lora else lm


def compare(
    rank: int,
    name: str,
    *,
    with_checkpointing: bool = False,
    with_lora: bool = False,
    with_compiling: bool = False,
    in_packs: bool = False,
) -> None:
    """Two steps on two ranks (the second starts from sharded weights), compared with one process that sees both."""
    alone = build(name, with_lora)
    expected = [step(PaddedModel(alone, check=False), shape, in_packs=False) for shape in RANK_SHAPES][rank]
    lm = build(name, with_lora)
    if with_checkpointing:
        lm.gradient_checkpointing_enable()
        lm.enable_input_require_grads()
    if with_compiling:
        compile_layers(lm, backend="eager")
    model = shard(PrefixGroupedModel(lm, min_reuse=0))
    for _ in range(2):
        model.zero_grad()
        logprobs = step(model, RANK_SHAPES[rank], in_packs)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    assert not model.refusal
    assert (counters["stats"]["unique_graphs"] > 0) == with_compiling
    for ours, theirs in zip(lm.parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            assert isinstance(ours.grad, DTensor)
            averaged = theirs.grad / len(RANK_SHAPES)
            torch.testing.assert_close(ours.grad.full_tensor(), averaged, rtol=0, atol=1e-6)
    if with_lora:
        check_reference(model, build_lm(CONFIGS[name]()), RANK_SHAPES[rank])


def shard(model: PrefixGroupedModel) -> PrefixGroupedModel:
    mesh = init_device_mesh("cpu", (len(RANK_SHAPES),))
    for layer in decoder_of(model.lm).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    return model


@torch.no_grad()
def check_reference(model: PrefixGroupedModel, plain: nn.Module, shape: str) -> None:
    """With its adapter off, the sharded policy is the model it started from."""
    token_ids, lengths, _ = SHAPES[shape]()
    with model.lm.disable_adapter():
        reference = model(token_ids, lengths).logprobs
    expected = PaddedModel(plain, check=False)(token_ids, lengths).logprobs
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_sharded_ranks_equal_one_process(tmp_path: Path) -> None:
    """The head is read in the root's forward, where its weight is whole."""
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=len(RANK_SHAPES))
