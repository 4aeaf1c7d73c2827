"""Two ranks and one server: the first hands the weights over, of a sharded policy too, and both ask."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from fake_vllm import FakeVLLM
from lit_agentrl.models import PaddedModel
from lit_agentrl.models.lm_parts import decoder_of
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts.vllm import EngineError, VLLMServer
from lit_agentrl.types import SamplingParams


def policy(folder: str) -> PaddedModel:
    """The same on every rank: an adapter that changes its base."""
    torch.manual_seed(0)
    lm = load_policy(folder, lora=Lora(r=4))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return PaddedModel(lm)


def run_rank(rank: int, store: str, url: str, folder: str, shared: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = policy(folder)
    for layer in decoder_of(model.lm).layers:
        fully_shard(layer)
    fully_shard(model)
    model(torch.tensor([[5, 6, 7]]), torch.tensor([3]))  # leaves the root gathered
    engine = VLLMServer([url], folder=shared, timeout=20.0, backoff=0.01, retries=0)
    engine.use_tokenizer(load_tokenizer(folder))
    engine.sync(model)
    found = engine.generate([[10 + 100 * rank]], SamplingParams(max_new_tokens=2))
    assert found[0].token_ids == [11 + 100 * rank, 12 + 100 * rank]
    assert engine.version == 1
    assert engine.fingerprint() is not None
    dist.barrier()
    broken = VLLMServer(["http://127.0.0.1:1"], folder=shared, timeout=5.0)
    broken.use_tokenizer(load_tokenizer(folder))
    with pytest.raises(EngineError, match="no server took the weights"):  # on both ranks
        broken.sync(model)
    dist.barrier()
    engine.close()
    dist.destroy_process_group()


def test_the_first_rank_hands_a_sharded_policy_over(tiny_lm: str, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def look(server: FakeVLLM, path: str, body: dict[str, Any]) -> None:
        if body.get("method") == "lit_load":
            seen.append(load_file(Path(body["args"][0]) / "model.safetensors"))

    (tmp_path / "shared").mkdir()
    with FakeVLLM(look) as server:
        arguments = (str(tmp_path / "store"), server.url, tiny_lm, str(tmp_path / "shared"))
        mp.spawn(run_rank, args=arguments, nprocs=2)  # type: ignore[no-untyped-call]
        asked = sorted(body["prompt"][0] for body in server.requests)
    assert asked == [10, 110]
    assert len(seen) == 1  # one rank, once
    whole = policy(tiny_lm).lm.merge_and_unload().state_dict()  # type: ignore[operator]
    assert set(seen[0]) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(seen[0][name], value, rtol=1e-6, atol=1e-6)
