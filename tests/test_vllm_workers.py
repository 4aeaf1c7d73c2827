"""One vLLM over two workers by tensor parallelism: what each holds of the weights, and the real one on CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_agentrl.rollouts.vllm.in_process import as_fingerprint
from lit_agentrl.types import Fingerprint
from lit_agentrl.vllm_worker import UnreadableWeightError, moments

torch.manual_seed(0)
EMBEDDING, QUERIES, KEYS, VALUES = (torch.randn(rows, 6) for rows in (5, 8, 2, 2))
OUT, OUT_BIAS, UP, NORM, GATE = (torch.randn(*shape) for shape in ((6, 8), (6,), (10, 6), (6,), (3, 6)))
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
