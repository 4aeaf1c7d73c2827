"""Two ranks with FSDP2 train as one process does, through the tree as through padded rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_agentrl.models import PaddedModel, PrefixGroupedModel
from prefix_cases import CONFIGS, SHAPES, build_lm

RANK_SHAPES = ("tree", "multi_turn")  # each rank has rows of its own


def step(model: PaddedModel, shape: str) -> None:
    token_ids, lengths, targets = SHAPES[shape]()
    model(token_ids, lengths, targets=targets).logprobs.mean().backward()


def run_rank(rank: int, store: str) -> None:
    """Tied weights with replayed layers, then sliding windows; one start of the processes serves both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(RANK_SHAPES))
    compare(rank, "qwen2", with_checkpointing=True)
    compare(rank, "gemma3", with_checkpointing=False)
    dist.destroy_process_group()


def compare(rank: int, name: str, *, with_checkpointing: bool) -> None:
    """Two steps on two ranks (the second starts from sharded weights), compared with one process that sees both."""
    mesh = init_device_mesh("cpu", (len(RANK_SHAPES),))
    alone = build_lm(CONFIGS[name]())
    for shape in RANK_SHAPES:
        step(PaddedModel(alone, check=False), shape)
    lm = build_lm(CONFIGS[name]())
    if with_checkpointing:
        lm.gradient_checkpointing_enable()
    model = PrefixGroupedModel(lm, min_reuse=0)
    for layer in lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        step(model, RANK_SHAPES[rank])
    assert not model.refusal
    for ours, expected in zip(lm.parameters(), alone.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        assert expected.grad is not None
        averaged = expected.grad / len(RANK_SHAPES)
        torch.testing.assert_close(ours.grad.full_tensor(), averaged, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_sharded_ranks_equal_one_process(tmp_path: Path) -> None:
    """The head is read in the root's forward, where its weight is whole."""
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=len(RANK_SHAPES))
