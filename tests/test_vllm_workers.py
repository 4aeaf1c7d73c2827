"""One vLLM over two workers by tensor parallelism: what each holds of the weights, and the real one on CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vllm_parts
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts import HFEngine, VLLMServer
from lit_agentrl.rollouts.vllm.in_process import as_fingerprint
from lit_agentrl.types import Fingerprint, SamplingParams
from lit_agentrl.vllm_worker import UnreadableWeightError, moments
from tiny import build_tiny_lm
from vllm_parts import CONTEXTS, SHAPE, run_case, served

DRAWS = torch.Generator().manual_seed(0)
EMBEDDING, QUERIES, KEYS, VALUES = (torch.randn(rows, 6, generator=DRAWS) for rows in (5, 8, 2, 2))
OUT, UP, GATE = (torch.randn(*shape, generator=DRAWS) for shape in ((6, 8), (10, 6), (3, 6)))
OUT_BIAS, NORM = torch.randn(6, generator=DRAWS), torch.randn(6, generator=DRAWS)
WHOLE = (EMBEDDING, QUERIES, KEYS, VALUES, OUT, OUT_BIAS, UP, NORM, GATE)


def layer(name: str, weight: Tensor, *, bias: Tensor | None = None, packed: bool = False, **told: Any) -> nn.Module:
    """One as vLLM calls it; a packed one is only multiplied by."""
    made = type(name, (nn.Module,), {})()
    made.weight = nn.Parameter(torch.empty(0) if packed else weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    if packed:
        made.input_size_per_partition = weight.shape[1]
        made.cpu_linear = lambda x, _, __: x @ weight.T
    for key, value in told.items():
        setattr(made, key, value)
    return made


def share(rank: int, *, packed: bool) -> nn.Module:
    """What one of two workers holds: its rows or columns, padded vocabulary, all of the keys, for there is one head."""
    half = slice(4 * rank, 4 * rank + 4)
    padded = torch.cat([EMBEDDING, torch.zeros(1, 6)])[3 * rank : 3 * rank + 3]
    model = nn.Module()
    model.embedding = layer("VocabParallelEmbedding", padded, tp_size=2, num_org_embeddings_per_partition=3 - rank)
    qkv = torch.cat([QUERIES[half], KEYS, VALUES])
    model.qkv = layer(
        "QKVParallelLinear", qkv, packed=packed, tp_size=2, num_heads=2, head_size=2, num_kv_head_replicas=2
    )
    model.out = layer("RowParallelLinear", OUT[:, half], bias=OUT_BIAS, packed=packed, tp_size=2)
    model.up = layer("MergedColumnParallelLinear", UP[5 * rank : 5 * rank + 5], packed=packed, tp_size=2)
    model.gate = layer("ReplicatedLinear", GATE, tp_size=2)
    model.norm = layer("RMSNorm", NORM)
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_the_workers_moments_add_up_to_the_models(packed):
    found = as_fingerprint([moments(share(rank, packed=packed), 2) for rank in (0, 1)])
    numbers = torch.cat([tensor.flatten() for tensor in WHOLE]).double()
    assert found is not None
    assert found.count == len(numbers) == 240
    assert found.total == pytest.approx(float(numbers.sum()), abs=1e-6)
    assert found.squares == pytest.approx(float(numbers.square().sum()), rel=1e-6)


def test_copies_that_differ_show():
    """A worker that did not reload what both hold."""
    shares = [share(rank, packed=False) for rank in (0, 1)]
    right = as_fingerprint([moments(each, 2) for each in shares])
    shares[1].norm.weight.data[0] += 0.5  # type: ignore[union-attr, operator, index]
    found = as_fingerprint([moments(each, 2) for each in shares])
    assert found is not None
    assert right is not None
    assert found.total - right.total == pytest.approx(0.25, abs=1e-6)


def test_what_is_spread_in_an_unknown_way_is_not_guessed():
    unknown = nn.Module()
    unknown.experts = layer("FusedMoE", GATE)
    assert moments(unknown, 1)["count"] == 18
    assert moments(unknown, 2)["count"] == 9  # loaded as a whole, so both have all of it
    unknown.experts.weight.weight_loader = print
    with pytest.raises(UnreadableWeightError, match="weight of experts is spread"):
        moments(unknown, 2)
    groups = nn.Module()
    groups.up = layer("ColumnParallelLinear", UP, tp_size=2)
    assert moments(groups, 2)["count"] == 60
    with pytest.raises(UnreadableWeightError, match="weight of up is spread"):
        moments(groups, 4)
    groups.up.tp_size = 1
    assert moments(groups, 4)["count"] == 15


def test_one_worker_that_cannot_tell_is_enough():
    one = {"count": 1.5, "total": 1.0, "squares": 2.0}
    assert as_fingerprint([one, one]) == Fingerprint(3, 2.0, 4.0)
    assert as_fingerprint([one, {"unknown": "packed"}]) is None


def is_policy(told: dict[str, Any], right: list[float]) -> bool:
    """Whether a fingerprint is that of the policy's own weights."""
    close = (told["total"] == pytest.approx(right[1], abs=1e-9), told["squares"] == pytest.approx(right[2], rel=1e-12))
    return told["count"] == right[0] and all(close)


@pytest.mark.slow
def test_two_workers_beside_the_trainer(vllm_python, tmp_path):
    """Each worker has a head of keys, a head of its own and biases."""
    shape = SHAPE | {"num_key_value_heads": 2, "attention_bias": True}
    found = run_case(vllm_python, "workers", build_tiny_lm(tmp_path / "lm", tie_word_embeddings=False, **shape))
    for ours, twins in found["runs"]:
        assert [each["token_ids"] for each in ours] == [each["token_ids"] for each in twins]
        for mine, his in zip(ours, twins, strict=True):
            assert mine["logprobs"] == pytest.approx(his["logprobs"], abs=1e-5)  # measured: 1e-6
    assert found["runs"][0][0] != found["runs"][1][0]
    assert all(is_policy(*each) for each in found["fingerprints"])
    assert found["fingerprints"][0] != found["fingerprints"][1]
    assert [each["version"] for each in found["states"]] == ["2", "2"]


@pytest.mark.slow
def test_a_server_of_two_workers(vllm_python, tmp_path):
    """They share a head of keys, and the model's head is its embedding. Adapters first, for these need the base."""
    folder = build_tiny_lm(tmp_path / "lm", tie_word_embeddings=True, **SHAPE)
    params = SamplingParams(temperature=0, max_new_tokens=12)
    with served(vllm_python, folder, tmp_path / "log", "--lora_rank", "4", "--tensor_parallel", "2") as url:
        for sync, lora in (("adapter", Lora(r=4)), ("full", None)):
            lm = load_policy(folder, lora=lora)
            made, twin = VLLMServer([url], sync=sync, timeout=60.0, retries=0), HFEngine()  # type: ignore[arg-type]
            made.use_tokenizer(load_tokenizer(folder))
            twin.use_tokenizer(load_tokenizer(folder))
            for seed in (6, 7):
                vllm_parts.change(lm, seed)
                made.sync(lm)
                twin.sync(lm)
                for mine, his in zip(made.generate(CONTEXTS, params), twin.generate(CONTEXTS, params), strict=True):
                    assert mine.token_ids == his.token_ids
                    assert mine.logprobs == pytest.approx(his.logprobs, abs=1e-5)  # measured: 1e-6
            told = made.fingerprint()
            assert told is None if lora else is_policy(vars(told), vllm_parts.moments(lm))
