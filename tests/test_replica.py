"""A copy to sample from has the policy's weights as of its last refresh, whatever the policy does meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lit_agentrl.errors import UserError
from lit_agentrl.models import PrefixGroupedModel
from lit_agentrl.models.compiled import compile_layers
from lit_agentrl.models.replica import Replica
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.models.shards import reshard
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import SamplingParams
from prefix_cases import CONFIGS, build_lm
from scoring_twins import lora

CONTEXTS = [[5, 6, 7, 8], [5, 6, 9]]
SAMPLING = SamplingParams(max_new_tokens=5)


def policy_of(name: str, with_lora: bool = True) -> PrefixGroupedModel:
    lm: nn.Module = build_lm(CONFIGS[name]())
    lm = lora(lm, target_modules="all-linear") if with_lora else lm
    return PrefixGroupedModel(lm.eval(), check=False)


def answers(engine: HFEngine) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(CONTEXTS, SAMPLING, seeds=[1, 2])]


def move(policy: nn.Module) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])  # qwen2 here has tied embeddings
def test_a_copy_stays_while_the_policy_moves(name: str, with_lora: bool) -> None:
    policy = policy_of(name, with_lora)
    own, shared = HFEngine(stop_token_ids=[], own_weights=True), HFEngine(stop_token_ids=[])
    own.sync(policy)
    shared.sync(policy)
    assert not own.shares_weights
    assert shared.shares_weights
    before = answers(own)
    assert before == answers(shared)
    move(policy)
    shared.sync(policy)
    assert answers(own) == before
    assert answers(shared) != before
    own.sync(policy)
    assert answers(own) == answers(shared)
    assert own.version == 2


def test_a_copy_of_compiled_layers_runs_its_own_weights() -> None:
    policy = policy_of("llama")
    compile_layers(policy.lm, backend="eager")
    replica = Replica(policy)
    replica.refresh(policy)
    tokens = torch.tensor(CONTEXTS[:1])
    with torch.no_grad():
        before = replica.lm(tokens).logits
        move(policy)
        torch.testing.assert_close(replica.lm(tokens).logits, before, rtol=0, atol=0)


def test_ties_and_gradients_of_the_policy_are_left_alone() -> None:
    policy = policy_of("qwen2", with_lora=False)
    assert policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight
    required = [parameter.requires_grad for parameter in policy.parameters()]
    replica = Replica(policy)
    replica.refresh(policy)
    assert replica.lm.get_output_embeddings().weight is replica.lm.get_input_embeddings().weight
    assert [parameter.requires_grad for parameter in policy.parameters()] == required
    assert not any(parameter.requires_grad for parameter in replica.lm.parameters())
    ours, theirs = dict(policy.lm.named_buffers()), dict(replica.lm.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name] is not theirs[name] for name in ours)


def test_a_bare_model_is_refused() -> None:
    engine = HFEngine(own_weights=True)
    with pytest.raises(UserError, match="PaddedModel"):
        engine.sync(build_lm(CONFIGS["llama"]()))


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, with_lora in (("qwen2", False), ("llama", True)):
        alone = policy_of(name, with_lora)
        policy = policy_of(name, with_lora)
        shard(policy, mesh, Sharding())
        engine, expected = HFEngine(stop_token_ids=[]), HFEngine(stop_token_ids=[])
        for _ in range(2):
            engine.sync(policy)
            expected.sync(alone)
            if rank == 0:  # ranks generate on their own: nothing waits for the other
                assert answers(engine) == answers(expected)
            policy(torch.tensor(CONTEXTS[:1]), torch.tensor([4]))  # leaves the root's weights gathered
            reshard(policy)
            move(policy)
            move(alone)
        assert not engine.shares_weights
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_samples_from_all_of_a_sharded_policy(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=2)
