"""`VLLMServer` and the real server on CPU, through a proxy that hangs, fails, cuts answers short and keeps weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import runs
from fake_vllm import FakeVLLM, FaultyProxy, first, hang, only, raw, status
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts import HFEngine, VLLMServer
from lit_agentrl.rollouts.vllm import EngineError
from lit_agentrl.types import SamplingParams
from tiny import build_tiny_lm
from vllm_parts import CONTEXTS, SHAPE, change, differences, moments, run_case, served

pytestmark = pytest.mark.slow
COMPLETIONS = "/v1/completions"
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_lm(tmp_path_factory.mktemp("lm") / "lm", tie_word_embeddings=True, **SHAPE)


@pytest.fixture(scope="module")
def url(vllm_python: str, folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One real server for all tests: each syncs it with weights of its own."""
    with served(vllm_python, folder, tmp_path_factory.mktemp("server") / "log") as address:
        yield address


@pytest.fixture
def lm(folder: str, request: pytest.FixtureRequest) -> PreTrainedModel | PeftModel:
    """Weights that no other test has."""
    lm = load_policy(folder)
    change(lm, len(request.node.name))
    return lm


def engine(lm: Any, folder: str, *urls: str, **options: Any) -> VLLMServer:
    made = VLLMServer(list(urls), **({"timeout": 60.0, "backoff": 0.01} | options))
    made.use_tokenizer(load_tokenizer(folder))
    made.sync(lm)
    return made


def twin(lm: Any, folder: str) -> HFEngine:
    made = HFEngine()
    made.use_tokenizer(load_tokenizer(folder))
    made.sync(lm)
    return made


def check(made: VLLMServer, lm: Any, folder: str) -> None:
    """The actions of the policy's very weights."""
    found, right = made.generate(CONTEXTS, GREEDY), twin(lm, folder).generate(CONTEXTS, GREEDY)
    assert [each.token_ids for each in found] == [each.token_ids for each in right]
    for mine, his in zip(found, right, strict=True):
        assert mine.logprobs == pytest.approx(his.logprobs, abs=1e-4)


def test_the_server_samples_from_the_policy(url, lm, folder):
    made = engine(lm, folder, url)
    check(made, lm, folder)
    told, right = made.fingerprint(), moments(lm)
    assert told is not None
    assert (told.count, told.total, told.squares) == (right[0], pytest.approx(right[1]), pytest.approx(right[2]))
    assert made.weights_dtype is torch.float32
    change(lm, 99)
    made.sync(lm)
    check(made, lm, folder)
    sampled = made.generate(CONTEXTS, SamplingParams(temperature=0.6, max_new_tokens=12), range(4))
    assert differences(lm, CONTEXTS, sampled, 0.6) < 1e-4
    again = made.generate(CONTEXTS, SamplingParams(temperature=0.6, max_new_tokens=12), range(4))
    assert [each.token_ids for each in again] == [each.token_ids for each in sampled]
    assert [each.num_cached for each in again] == [64, 64, 0, 32]
    assert made.num_failures == 0


def test_stops_are_hfengines(url, lm, folder):
    made, right = engine(lm, folder, url), twin(lm, folder)
    written = [token for each in right.generate(CONTEXTS, GREEDY) for token in each.token_ids[1:]]
    tokenizer = load_tokenizer(folder)
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in written]
    text = next(piece for piece in pieces if piece and "\ufffd" not in piece)
    for stops in ({"stop": (text,)}, {"stop_token_ids": (written[2],)}):
        params = SamplingParams(temperature=0, max_new_tokens=12, **stops)  # type: ignore[arg-type]
        mine, his = made.generate(CONTEXTS, params), right.generate(CONTEXTS, params)
        assert [(each.token_ids, each.finish) for each in mine] == [(each.token_ids, each.finish) for each in his]
        assert any(each.finish == "stop" for each in mine)


def test_faults_that_pass_are_survived(url, lm, folder):
    half = lambda server, path, body: server.right(path, body | {"max_tokens": 5})  # noqa: E731
    for fault in (status(500), half, raw(b"<html>"), raw(b'{"choices": [')):
        with FaultyProxy(url, only(COMPLETIONS, first(2, fault))) as proxy:
            made = engine(lm, folder, proxy.url)
            check(made, lm, folder)
            assert made.num_failures == 2


def test_too_few_tokens_that_stay_end_with_the_reason(url, lm, folder):
    half = lambda server, path, body: server.right(path, body | {"max_tokens": 5})  # noqa: E731
    with FaultyProxy(url, only(COMPLETIONS, half)) as proxy:
        made = engine(lm, folder, proxy.url, retries=1)
        with pytest.raises(EngineError, match=r"5 tokens came where 12 were asked for.*resumed"):
            made.generate(CONTEXTS, GREEDY)


def test_a_hanging_server_is_left_for_another(url, lm, folder):
    with FaultyProxy(url, only(COMPLETIONS, hang(60))) as bad, FaultyProxy(url) as good:
        made = engine(lm, folder, bad.url, good.url, timeout=3.0)
        check(made, lm, folder)
        assert [str(each) for each in made.asked] == [good.url]
    with FaultyProxy(url, only(COMPLETIONS, hang(60))) as bad:
        made = engine(lm, folder, bad.url, timeout=1.0, retries=0)
        with pytest.raises(EngineError, match=r"did not answer within 1 seconds"):
            made.generate(CONTEXTS, GREEDY)


def test_a_server_that_dies_is_left_for_another(url, lm, folder):
    with FaultyProxy(url) as dying, FaultyProxy(url) as good:
        made = engine(lm, folder, dying.url, good.url)
        check(made, lm, folder)
        dying.stop()
        check(made, lm, folder)
        assert [str(each) for each in made.asked] == [good.url]


def test_weights_that_never_arrive_are_noticed(url, lm, folder):
    """A proxy that answers syncs itself, for a server that keeps what it had."""

    def swallow(server: FakeVLLM, path: str, body: dict[str, Any]) -> tuple[int, bytes] | None:
        if body.get("method") != "lit_load":
            return None
        return 200, json.dumps({"results": [{"version": body["args"][1]}]}).encode()

    with FaultyProxy(url, only("/collective_rpc", swallow)) as proxy, pytest.raises(EngineError, match="stale weights"):
        engine(lm, folder, proxy.url)


def test_weights_that_somebody_else_changes_are_noticed(url, lm, folder):
    made = engine(lm, folder, url)
    check(made, lm, folder)
    engine(lm, folder, url)  # another run takes the server
    with pytest.raises(EngineError, match=r"stale weights: version \w+\.1 was handed over, it samples from \w+\.1"):
        made.generate(CONTEXTS, GREEDY)


def test_a_model_of_another_shape_is_refused(url, folder, tmp_path):
    other = build_tiny_lm(tmp_path / "lm", **(SHAPE | {"hidden_size": 96}))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no server took the weights of sync 1"):
        engine(load_policy(other), other, url)
    lm = load_policy(folder)
    check(engine(lm, folder, url), lm, folder)  # the server is as good as before


def test_a_server_without_room_for_adapters_is_refused(url, folder):
    lm = load_policy(folder, lora=Lora(r=9))
    with pytest.raises(EngineError, match=r"of rank 9, .* room for adapters of none. Start it with.* --lora_rank 16"):
        engine(lm, folder, url, sync="adapter")


def fitted(run: Path) -> None:
    """Two iterations were trained, and the sampler's log-probabilities were close to the trainer's."""
    rows = [row for row in runs.metrics(run) if row.get("train/loss")]
    assert len(rows) == 2
    gaps = [float(row["canary/logp_gap"]) for row in runs.metrics(run) if row.get("canary/logp_gap")]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    weights = [float(row["canary/fingerprint_gap"]) for row in runs.metrics(run) if row.get("canary/fingerprint_gap")]
    assert len(weights) == 2
    assert max(weights) < 1e-9


def test_a_fit_over_the_server(url, folder, tmp_path):
    chosen = {"class_path": "VLLMServer", "init_args": {"urls": [url], "timeout": 60}}
    runs.fit(
        folder,
        tmp_path / "run",
        "--data.engine",
        json.dumps(chosen),
        "--model.old_logprobs",
        "recompute",
        "--model.lora",
        '{"r": 4}',
    )
    fitted(tmp_path / "run")


def test_a_fit_with_vllm_beside_it(vllm_python, folder, tmp_path):
    run = tmp_path / "run"
    found = run_case(vllm_python, "fit", folder, str(run))
    assert found["shm"] == []
    fitted(run)
