"""A fingerprint is of the values of weights: not of their names, layout, adapters or shards."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lit_agentrl.models.fingerprint import distance, fingerprint, policy_fingerprint
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.models.shards import reshard
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Fingerprint
from prefix_cases import CONFIGS, build_lm
from scoring_twins import lora
from test_replica import policy_of


def test_moments_by_hand() -> None:
    found = fingerprint([torch.tensor([[1.0, -2.0]]), torch.tensor(3.0)])
    assert found == Fingerprint(count=3, total=2.0, squares=14.0)
    assert fingerprint([torch.tensor([1.001, 3.0])], torch.bfloat16) == Fingerprint(2, 4.0, 10.0)  # 1.001 is 1 in it
    assert fingerprint([]) == Fingerprint(0, 0.0, 0.0)


def test_integers_too_large_for_float32_add_up() -> None:
    """2^24 + 1 is no float32: the sums are float64."""
    assert fingerprint([torch.tensor([2.0**24]), torch.tensor([1.0])]).total == 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_as_exact_as_float64_can_hold(dtype: torch.dtype) -> None:
    """Against `math.fsum`, over several chunks and a part of one; and the weights are left as they were."""
    weight = torch.randn(1023, 1025, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, exact = weight.clone(), weight.double()
    expected = Fingerprint(
        weight.numel(), math.fsum(exact.flatten().tolist()), math.fsum(exact.square().flatten().tolist())
    )
    assert distance(fingerprint([weight]), expected) < 1e-12
    assert torch.equal(weight, before)


def test_fusing_and_splitting_change_nothing() -> None:
    weights = [torch.randn(40, 30), torch.randn(50, 30)]
    fused, turned = torch.cat(weights), torch.cat(weights).T
    assert distance(fingerprint(weights), fingerprint([fused])) < 1e-12
    assert distance(fingerprint(weights), fingerprint([turned[:7], turned[7:]])) < 1e-12


def test_distance_by_hand() -> None:
    """|3 - 1| / sqrt(4) = 1 by the sums; |4 - 9| sqrt(16) / (2 * 4) = 2.5 by the squares."""
    assert distance(Fingerprint(16, 3.0, 4.0), Fingerprint(16, 1.0, 4.0)) == 1.0
    assert distance(Fingerprint(16, 3.0, 4.0), Fingerprint(16, 3.0, 9.0)) == 2.5
    assert distance(Fingerprint(16, 3.0, 4.0), Fingerprint(17, 3.0, 4.0)) == math.inf
    assert distance(Fingerprint(16, math.nan, 4.0), Fingerprint(16, math.nan, 4.0)) == math.inf
    assert distance(Fingerprint(2, 0.0, 0.0), Fingerprint(2, 0.0, 0.0)) == 0.0
    assert distance(Fingerprint(2, 0.0, 0.0), Fingerprint(2, 0.0, 1e-9)) == math.inf


def test_distance_is_the_relative_one_for_noise() -> None:
    """Of the right size: within a factor of 5 over 20 draws, three orders of magnitude apart from none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    for _ in range(20):
        noise = torch.randn(200, 300, generator=generator, dtype=torch.float64) * 1e-3
        found = distance(fingerprint([weight]), fingerprint([weight + noise]))
        assert found < 5 * 1e-3
        assert found > 1e-3 / 20  # both moments would have to be lucky


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # qwen2 here has tied embeddings
def test_a_tied_weight_counts_once_and_buffers_do_not(name: str) -> None:
    lm = build_lm(CONFIGS[name]())
    lm.register_buffer("counter", torch.ones(3))
    unique = {id(parameter): parameter for parameter in lm.parameters()}.values()
    found = policy_fingerprint(lm)
    assert found is not None
    assert found.count == sum(parameter.numel() for parameter in unique)
    assert found.squares == pytest.approx(sum(float(p.detach().double().square().sum()) for p in unique), rel=1e-12)
    is_tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert is_tied == (name == "qwen2")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_an_adapter_is_merged_and_the_model_left_alone(name: str, options: dict[str, bool]) -> None:
    lm = lora(build_lm(CONFIGS[name]()), target_modules="all-linear", **options).float()
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    found = policy_fingerprint(lm)
    merged = policy_fingerprint(copy.deepcopy(lm).merge_and_unload())
    base = policy_fingerprint(copy.deepcopy(lm).unload())
    assert found is not None
    assert merged is not None
    assert base is not None
    assert distance(found, merged) < 1e-8
    assert distance(found, base) > 1e-4
    assert all(torch.equal(value, before[key]) for key, value in lm.state_dict().items())


def test_one_number_off_by_a_thousandth_is_seen() -> None:
    lm = build_lm(CONFIGS["llama"]())
    before = policy_fingerprint(lm)
    with torch.no_grad():
        lm.get_input_embeddings().weight[3, 1] += 1e-3
    after = policy_fingerprint(lm)
    assert before is not None
    assert after is not None
    assert distance(before, after) > 1e-5


def test_casting_comes_after_merging() -> None:
    """What an engine in bfloat16 was given: merged in full, then cast."""
    lm = lora(build_lm(CONFIGS["llama"]()), target_modules="all-linear").float()
    found = policy_fingerprint(lm, torch.bfloat16)
    assert found == policy_fingerprint(copy.deepcopy(lm).merge_and_unload().bfloat16())
    assert found != policy_fingerprint(lm)


def test_quantised_weights_have_none() -> None:
    lm = nn.Linear(4, 4)
    lm.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert policy_fingerprint(lm) is None


def test_an_engine_s_fingerprint_is_of_what_it_samples_from() -> None:
    policy = policy_of("llama")
    own, shared = HFEngine(own_weights=True), HFEngine()
    assert own.fingerprint() is None  # it has no weights yet
    own.sync(policy)
    shared.sync(policy)
    synced = policy_fingerprint(policy.lm)
    assert own.fingerprint() == shared.fingerprint() == synced
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data.mul_(1.5)
    assert own.fingerprint() == synced
    assert shared.fingerprint() == policy_fingerprint(policy.lm) != synced


def test_a_fingerprint_says_which_module_it_is_of() -> None:
    """The policy's where the engine samples from that; a copy, or weights in another type, are not it."""
    policy = policy_of("llama")
    own, shared = HFEngine(own_weights=True), HFEngine()
    for engine, is_policy_s in ((shared, True), (own, False)):
        engine.sync(policy)
        found = engine.fingerprint()
        assert found is not None
        assert (found.of is policy.lm) == is_policy_s
    cast = policy_fingerprint(policy.lm, torch.bfloat16)
    assert cast is not None
    assert cast.of is None


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, with_lora in (("qwen2", False), ("llama", True)):
        expected = policy_fingerprint(policy_of(name, with_lora).lm)
        policy = policy_of(name, with_lora)
        shard(policy, mesh, Sharding())
        assert expected is not None
        for _ in range(2):
            found = policy_fingerprint(policy.lm)
            assert found is not None
            assert found.count == expected.count
            assert distance(found, expected) < 1e-12
            policy(torch.tensor([[5, 6, 7, 8]]), torch.tensor([4]))  # leaves the root's weights gathered
            reshard(policy)
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_add_up_to_the_whole(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path / "store"),), nprocs=2)
