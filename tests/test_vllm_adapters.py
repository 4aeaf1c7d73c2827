"""`VLLMServer(sync="adapter")`: with made-up servers, and with the real one on CPU under one adapter after another."""

import json
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel

import runs
from fake_vllm import FakeVLLM, Fault, FaultyProxy, first, only, status
from lit_agentrl import vllm_worker
from lit_agentrl.errors import UserError
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts import HFEngine, VLLMServer
from lit_agentrl.rollouts.vllm import EngineError
from lit_agentrl.types import SamplingParams
from tiny import build_tiny_lm
from vllm_parts import CONTEXTS, SHAPE, differences, served

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
LOAD, COMPLETIONS, WORKERS = "/v1/load_lora_adapter", "/v1/completions", "/collective_rpc"


def adapted(folder: str, seed: int, rank: int = 4) -> PeftModel:
    """A policy whose adapter says something else for every seed."""
    lm = load_policy(folder, lora=Lora(r=rank))
    change(lm, seed)
    assert isinstance(lm, PeftModel)
    return lm


def change(lm: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)


def engine(folder: str, *urls: str) -> VLLMServer:
    made = VLLMServer(list(urls), sync="adapter", timeout=60.0, backoff=0.01)
    made.use_tokenizer(load_tokenizer(folder))
    return made


def check(made: VLLMServer, lm: Any, folder: str) -> None:
    """The actions of this very adapter."""
    right = HFEngine()
    right.use_tokenizer(load_tokenizer(folder))
    right.sync(lm)
    for mine, his in zip(made.generate(CONTEXTS, GREEDY), right.generate(CONTEXTS, GREEDY), strict=True):
        assert mine.token_ids == his.token_ids
        assert mine.logprobs == pytest.approx(his.logprobs, abs=1e-5)  # measured: 1e-6


def keeps(name: str) -> Fault:
    """Adapters do not reach the server behind, and requests for any get those of `name`; nobody is told."""

    def act(server: FakeVLLM, path: str, body: dict[str, Any]) -> tuple[int, bytes] | None:
        if path in (LOAD, "/v1/unload_lora_adapter"):
            return 200, b"Success"
        if path != COMPLETIONS:
            return None
        code, raw = server.right(path, body | {"model": name})
        return code, json.dumps(json.loads(raw) | {"model": body["model"]}).encode()

    return act


def answers_as(name: str) -> Fault:
    """Requests for any adapter get what the one of `name` says."""
    return only(COMPLETIONS, lambda server, path, body: server.right(path, body | {"model": name}))


# ---- made-up servers


def test_moments_are_of_both_matrices_of_every_layer():
    one = types.SimpleNamespace(lora_a=torch.tensor([[1.0, 2.0]]), lora_b=torch.tensor([[3.0], [4.0]]))
    packed = types.SimpleNamespace(lora_a=[torch.tensor([[5.0]]), None], lora_b=[torch.tensor([[-6.0]]), None])
    adapter = types.SimpleNamespace(loras={"down_proj": one, "qkv_proj": packed})
    assert vllm_worker.adapter_moments(adapter) == {"count": 6, "total": 9.0, "squares": 91.0}


def test_an_adapter_that_is_too_large_for_the_server(tiny_lm):
    with FakeVLLM() as server:
        server.lora_rank = 8
        said = r"of rank 12, .* room for adapters of rank 8 at most. Start it with .* --lora_rank 16"
        with pytest.raises(EngineError, match=said):
            engine(tiny_lm, server.url).sync(adapted(tiny_lm, 1, rank=12))
        assert server.adapters == []


def test_a_rank_that_no_server_has_room_for(tiny_lm):
    with FakeVLLM() as server, pytest.raises(UserError, match="rank 1 to 512, and this is of rank 520"):
        engine(tiny_lm, server.url).sync(adapted(tiny_lm, 1, rank=520))


def test_a_server_whose_adapters_cannot_be_changed(tiny_lm):
    with FakeVLLM(only(LOAD, status(404, "Not Found"))) as server:
        made = engine(tiny_lm, server.url)
        with pytest.raises(EngineError, match=r"404.*serve-vllm MODEL --lora_rank"):
            made.sync(adapted(tiny_lm, 1))


def test_an_adapter_that_does_not_arrive_is_noticed(tiny_lm):
    with FakeVLLM() as server:
        made, lm = engine(tiny_lm, server.url), adapted(tiny_lm, 1)
        made.sync(lm)
        server.fault = keeps(server.adapters[0])
        change(lm, 2)
        with pytest.raises(EngineError, match=r"stale weights: adapter \w+\.2 .* none of the 1 that it holds"):
            made.sync(lm)


def test_an_adapter_that_is_lost_later_is_noticed_too(tiny_lm):
    """As by a server behind a gateway that is started anew, and loads what it had on its disk."""
    with FakeVLLM() as server:
        made, lm = engine(tiny_lm, server.url), adapted(tiny_lm, 1)
        made.sync(lm)
        server.held[0]["total"] += 1e-3
        with pytest.raises(EngineError, match="stale weights"):
            made.generate(CONTEXTS, GREEDY)


def test_answers_of_a_stale_server_do_not_count_where_another_is_right(tiny_lm):
    with FakeVLLM() as stale, FakeVLLM() as good:
        made, lm = engine(tiny_lm, stale.url, good.url), adapted(tiny_lm, 1)
        made.sync(lm)
        stale.held.clear()
        made.generate(CONTEXTS, GREEDY)
        assert [str(each) for each in made.asked] == [good.url]


# ---- the real server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_lm(tmp_path_factory.mktemp("lm") / "lm", tie_word_embeddings=True, **SHAPE)


@pytest.fixture(scope="module")
def url(vllm_python: str, folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One real server for all tests."""
    with served(vllm_python, folder, tmp_path_factory.mktemp("server") / "log", "--lora_rank", "4") as address:
        yield address


@pytest.mark.slow
def test_the_server_samples_under_one_adapter_after_the_other(url, folder):
    made, lm = engine(folder, url), adapted(folder, 1)
    (server,) = made.endpoints
    said = set()
    for seed in range(1, 6):
        change(lm, seed)
        made.sync(lm)
        check(made, lm, folder)
        said.add(str(made.generate(CONTEXTS, GREEDY)[0].token_ids))
        names = [name for name in server.served_models() if name.startswith(f"{made._run}.")]
        assert names == [f"{made._run}.{seed}"]
        assert len(server.call_workers("lit_adapters")["adapters"]) <= 2
    assert len(said) == 5
    params = SamplingParams(temperature=0.6, max_new_tokens=12)
    assert differences(lm, CONTEXTS, made.generate(CONTEXTS, params, range(4)), 0.6) < 1e-4  # measured: 3e-5
    assert made.num_failures == 0
    assert made.fingerprint() is None


@pytest.mark.slow
def test_a_sync_that_failed_is_done_again(url, folder):
    """Under the same name, with other numbers: neither the first ones nor their keys and values are left."""
    with FaultyProxy(url) as proxy:
        made, lm = engine(folder, proxy.url), adapted(folder, 11)

        def fail(server: FakeVLLM, path: str, body: dict[str, Any]) -> tuple[int, bytes] | None:
            if path != WORKERS or body["method"] != "lit_adapters":
                return None
            for context in CONTEXTS:
                server.right(COMPLETIONS, {"model": f"{made._run}.1", "prompt": context, "max_tokens": 1})
            return 500, b"{}"

        proxy.fault = fail
        with pytest.raises(EngineError, match="no server took the weights of sync 1"):
            made.sync(lm)
        proxy.fault = None
        change(lm, 12)
        made.sync(lm)
        check(made, lm, folder)


@pytest.mark.slow
def test_a_server_that_serves_a_stale_adapter_is_found(url, folder):
    with FaultyProxy(url) as proxy:
        made, lm = engine(folder, proxy.url), adapted(folder, 21)
        made.sync(lm)
        check(made, lm, folder)
        proxy.fault = keeps(f"{made._run}.1")
        change(lm, 22)
        with pytest.raises(EngineError, match=rf"stale weights: adapter {made._run}\.2 was handed over"):
            made.sync(lm)
    with FaultyProxy(url) as proxy:
        old, made = engine(folder, url), engine(folder, proxy.url)
        old.sync(lm)
        change(lm, 23)
        made.sync(lm)
        check(made, lm, folder)
        proxy.fault = answers_as(f"{old._run}.1")
        with pytest.raises(EngineError, match=rf"it is by {old._run}\.1, where {made._run}\.1 was asked for"):
            made.generate(CONTEXTS, GREEDY)


@pytest.mark.slow
def test_an_adapter_that_the_server_has_lost(url, folder):
    made, lm = engine(folder, url), adapted(folder, 31)
    made.sync(lm)
    made.endpoints[0].unload_adapters(f"{made._run}.")
    with pytest.raises(EngineError, match=r"404.*does not exist"):
        made.generate(CONTEXTS, GREEDY)


@pytest.mark.slow
def test_faults_that_pass_are_survived(url, folder):
    lm = adapted(folder, 41)
    with FaultyProxy(url, only(COMPLETIONS, first(2, status(500)))) as proxy:
        made = engine(folder, proxy.url)
        made.sync(lm)
        check(made, lm, folder)
        assert made.num_failures == 2


@pytest.mark.slow
def test_a_fit_by_adapters(url, folder, tmp_path):
    chosen = {"class_path": "VLLMServer", "init_args": {"urls": [url], "timeout": 60, "sync": "adapter"}}
    options = ["--data.engine", json.dumps(chosen), "--model.old_logprobs", "recompute", "--model.lora", '{"r": 4}']
    runs.fit(folder, tmp_path / "run", *options)
    gaps = [float(row["canary/logp_gap"]) for row in runs.metrics(tmp_path / "run") if row.get("canary/logp_gap")]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4


@pytest.mark.slow
def test_a_base_that_somebody_else_changes_is_noticed(url, folder):
    """The last one: the server has no base for adapters any more."""
    made, lm = engine(folder, url), adapted(folder, 51)
    made.sync(lm)
    other = VLLMServer([url], timeout=60.0)
    other.use_tokenizer(load_tokenizer(folder))
    other.sync(load_policy(folder))
    for call in (lambda: made.generate(CONTEXTS, GREEDY), lambda: made.sync(lm)):
        with pytest.raises(EngineError, match=r"no longer has the weights that it was started with.*Start it anew"):
            call()
