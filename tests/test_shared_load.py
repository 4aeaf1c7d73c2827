"""One rank reads the weights; all ranks have the model, and none of the others opened its files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from lit_agentrl.errors import UserError
from lit_agentrl.models import PrefixGroupedModel, policy
from lit_agentrl.models.policy import Lora, Policy, export, load_policy, load_tokenizer
from lit_agentrl.models.replica import Replica
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.models.shared_load import SharedLoad
from tiny import build_tiny_lm
from vlm_folders import FAMILIES, build_vlm_folder


def refuse(*_: object, **__: object) -> Policy:
    raise AssertionError("this rank was to read no weights")


def run_rank(rank: int, store: str, cases: list[tuple[str, Lora | None]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for folder, adapter in cases:
        torch.manual_seed(0)
        alone = load_policy(folder, lora=adapter)
        reading = policy._load_weights, policy.PeftModel.from_pretrained, policy.load_trained_parts
        if rank == 1:
            policy._load_weights = policy.PeftModel.from_pretrained = policy.load_trained_parts = refuse  # type: ignore[assignment]
        shared = SharedLoad(lambda empty, folder=folder, lora=adapter: load_policy(folder, lora=lora, empty=empty))  # type: ignore[misc]
        policy._load_weights, policy.PeftModel.from_pretrained, policy.load_trained_parts = reading
        model = PrefixGroupedModel(shared.lm, check=False)
        shard(model, mesh, Sharding())
        shared.fill(model)
        same(model, alone)
    with pytest.raises(UserError, match="nowhere"):
        SharedLoad(partial(unreadable, rank))
    dist.destroy_process_group()


def unreadable(rank: int, empty: bool) -> Policy:
    assert rank == 0, "the other rank learns of it without trying"
    raise UserError("the weights are nowhere")


def same(model: PrefixGroupedModel, alone: Policy) -> None:
    """Weights, buffers, what is trained, and how the model ends its answers."""
    replica = Replica(model)
    replica.refresh(model)
    expected, found = dict(alone.named_parameters()), dict(replica.lm.named_parameters())
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].data, weight.data, rtol=0, atol=0)
        assert found[name].dtype == weight.dtype
    ours = {name: p.requires_grad for name, p in model.lm.named_parameters()}
    theirs = {name: p.requires_grad for name, p in expected.items()}
    assert ours == theirs, [(n, ours[n], theirs[n]) for n in ours if ours[n] != theirs[n]][:3]
    assert any(ours.values())
    for (name, buffer), (other, value) in zip(alone.named_buffers(), model.lm.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, value)
    assert model.lm.generation_config.to_dict() == alone.generation_config.to_dict()
    with torch.no_grad():
        tokens, lengths = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([5])
        expected_scores = PrefixGroupedModel(alone, check=False)(tokens, lengths).logprobs
        torch.testing.assert_close(model(tokens, lengths).logprobs, expected_scores, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_one_rank_reads_for_all(tmp_path: Path) -> None:
    tied = build_tiny_lm(tmp_path / "tied", tie_word_embeddings=True)
    torch.manual_seed(3)
    export(load_policy(tied, lora=Lora(r=3)), load_tokenizer(tied), tmp_path / "adapter", merge=False)
    family = next(iter(FAMILIES))
    vlm = str(build_vlm_folder(tmp_path / "vlm", family))
    cases = [(tied, None), (tied, Lora(r=4)), (str(tmp_path / "adapter"), None), (vlm, None), (vlm, Lora(r=2))]
    mp.spawn(run_rank, (str(tmp_path / "store"), cases), nprocs=2)
