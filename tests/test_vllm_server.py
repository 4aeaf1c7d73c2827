"""`VLLMServer` against made-up servers that fail in every way, and against the real one behind such faults."""

import logging
import time
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from fake_vllm import FakeVLLM, Fault, changed, first, hang, only, raw, status, too_few
from lit_agentrl.datamodules import RolloutDataModule
from lit_agentrl.datamodules.rollout_checks import warn_of_kernels
from lit_agentrl.envs import EchoSuite
from lit_agentrl.errors import UserError
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts import HFEngine
from lit_agentrl.rollouts.vllm import EngineError, VLLMServer
from lit_agentrl.rollouts.vllm.http import Address
from lit_agentrl.types import Fingerprint, SamplingParams

COMPLETIONS = "/v1/completions"
CONTEXTS = [[5, 6, 7], [5, 6, 9], [5, 20]]
PARAMS = SamplingParams(max_new_tokens=4, temperature=0.5)


@pytest.fixture(scope="module")
def lm(tiny_lm: str) -> PreTrainedModel | PeftModel:
    return load_policy(tiny_lm)


def engine(lm: PreTrainedModel | PeftModel, tiny_lm: str, *servers: FakeVLLM, **options: object) -> VLLMServer:
    """One that asks `servers`, synced once, with short waits."""
    made = VLLMServer([server.url for server in servers], **({"timeout": 5.0, "backoff": 0.01} | options))  # type: ignore[arg-type]
    made.use_tokenizer(load_tokenizer(tiny_lm))
    made.sync(lm)
    return made


def tokens(completions: list) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


RIGHT = [[8, 9, 10, 11], [10, 11, 12, 13], [21, 22, 23, 24]]


def test_requests_leave_nothing_to_the_server(lm, tiny_lm):
    with FakeVLLM() as server:
        made = engine(lm, tiny_lm, server)
        found = made.generate(CONTEXTS, SamplingParams(0.5, 4, 0.9, 7, stop_token_ids=(11,)), seeds=[2**62, 1, 2])
        body = next(body for body in server.requests if body["prompt"] == [5, 6, 7])
    assert tokens(found) == [[8, 9, 10, 11], [10, 11], [21, 22, 23, 24]]
    assert [completion.finish for completion in found] == ["stop", "stop", "length"]
    assert found[0].logprobs == [-0.08, -0.09, -0.10, -0.11]
    assert (found[0].num_cached, found[0].num_prefilled) == (2, 1)
    sampled = ("temperature", "top_p", "top_k", "seed", "max_tokens", "ignore_eos")
    assert [body[name] for name in sampled] == [0.5, 0.9, 7, 2**62, 4, True]
    assert set(body["stop_token_ids"]) == {2, 11}  # the model's own end token, and the one that was asked for
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: body[name] for name in neutral} == neutral


def test_stop_strings_end_actions_as_in_hfengine(lm, tiny_lm):
    """The server sees none of them (a fake reads no text), so the action is cut at the token that completes one."""
    tokenizer = load_tokenizer(tiny_lm)
    a, b, c, d = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    assert [b, c, d] == [a + 1, a + 2, a + 3]
    with FakeVLLM() as server:
        made = engine(lm, tiny_lm, server)
        found = made.generate([[a - 1]], SamplingParams(max_new_tokens=6, stop=("bc",)))
    assert tokens(found) == [[a, b, c]]
    assert found[0].finish == "stop"


def test_a_stop_that_the_text_does_not_show_is_gone_on_from(lm, tiny_lm):
    """vLLM took something for a stop string after two tokens; the action's own text has none, so it goes on."""
    early = only(
        COMPLETIONS,
        first(
            1,
            lambda s, p, body: changed(
                token_ids=[101, 102], finish_reason="stop", logprobs={"token_logprobs": [-1.0, -2.0]}
            )(s, p, body),
        ),
    )
    with FakeVLLM(early) as server:
        made = engine(lm, tiny_lm, server)
        (found,) = made.generate([[100]], SamplingParams(max_new_tokens=5, stop=("zz",)), seeds=[3])
        again = server.requests[-1]
    assert found.token_ids == [101, 102, 103, 104, 105]
    assert found.logprobs[:2] == [-1.0, -2.0]
    assert (again["prompt"], again["max_tokens"]) == ([100, 101, 102], 3)
    assert again["seed"] != 3  # the same draws again would repeat the first tokens' noise


FAULTS: dict[str, Fault] = {
    "HTTP 500": status(500),
    "HTTP 503": status(503),
    "HTTP 429": status(429),
    "no JSON": raw(b"<html>"),
    "half of a JSON": raw(b'{"choices": [{"token_ids": [1, 2'),
    "nothing": raw(b""),
    "no choices": raw(b'{"choices": []}'),
    "a list": raw(b"[1, 2]"),
    "no token ids": changed(token_ids=None),
    "texts as token ids": changed(token_ids=["a", "b", "c", "d"]),
    "too few tokens": too_few(2),
    "no tokens": too_few(0),
    "too many tokens": changed(token_ids=[1] * 5, logprobs={"token_logprobs": [0.0] * 5}),
    "a token beyond the vocabulary": changed(token_ids=[1, 1, 1, 300]),
    "a missing log-probability": changed(logprobs={"token_logprobs": [-1.0] * 3}),
    "null as log-probability": changed(logprobs={"token_logprobs": [-1.0, None, -1.0, -1.0]}),
    "a probability above 1": changed(logprobs={"token_logprobs": [-1.0, 0.5, -1.0, -1.0]}),
    "an aborted request": changed(finish_reason="abort"),
    "stopped by nothing": changed(finish_reason="stop"),
    "another prompt": changed(prompt_token_ids=[9]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived_where_a_retry_helps(lm, tiny_lm, fault):
    with FakeVLLM(only(COMPLETIONS, first(2, FAULTS[fault]))) as server:
        made = engine(lm, tiny_lm, server)
        assert tokens(made.generate(CONTEXTS, PARAMS)) == RIGHT
        assert made.num_failures == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_the_run_and_names_the_server(lm, tiny_lm, fault):
    with FakeVLLM(only(COMPLETIONS, FAULTS[fault])) as server:
        made = engine(lm, tiny_lm, server, retries=1)
        with pytest.raises(EngineError, match=r"failed after 2 tries.*" + server.url):
            made.generate(CONTEXTS[:1], PARAMS)


@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_takes_over(lm, tiny_lm, fault):
    with FakeVLLM(only(COMPLETIONS, FAULTS[fault])) as bad, FakeVLLM() as good:
        made = engine(lm, tiny_lm, bad, good)
        assert tokens(made.generate(CONTEXTS * 4, PARAMS)) == RIGHT * 4
        assert made.endpoints[0].num_failures == made.num_failures > 0


def test_a_refused_request_is_not_repeated(lm, tiny_lm):
    with FakeVLLM(only(COMPLETIONS, status(400, "prompt too long"))) as server:
        made = engine(lm, tiny_lm, server)
        with pytest.raises(EngineError, match=r"after 1 tries.*400.*prompt too long"):
            made.generate(CONTEXTS[:1], PARAMS)


def test_a_server_that_hangs_is_given_up_at_the_deadline(lm, tiny_lm):
    with FakeVLLM(only(COMPLETIONS, hang(30.0))) as server:
        made = engine(lm, tiny_lm, server, timeout=0.2, retries=1)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"2 tries.*did not answer within 0.2 seconds"):
            made.generate(CONTEXTS, PARAMS)
        assert time.monotonic() - began < 5
        assert made.longest_seconds == pytest.approx(0.2 * 2 + 0.01)


def test_a_server_that_hangs_is_left_out_where_there_is_another(lm, tiny_lm, caplog):
    with FakeVLLM(only(COMPLETIONS, hang(30.0))) as bad, FakeVLLM() as good:
        made = engine(lm, tiny_lm, bad, good, timeout=0.5)
        assert tokens(made.generate(CONTEXTS, PARAMS)) == RIGHT
        assert made.asked == [made.endpoints[1]]
        assert f"{bad.url} is left out until the next sync: it did not answer within 0.5 seconds" in caplog.text
        began = time.monotonic()
        assert tokens(made.generate(CONTEXTS, PARAMS)) == RIGHT
        assert time.monotonic() - began < 0.5  # nobody waits for it a second time
        bad.fault = None
        made.sync(lm)
        assert made.asked == made.endpoints


def test_one_of_two_servers_dies_in_the_middle(lm, tiny_lm):
    with FakeVLLM() as dying, FakeVLLM() as good:
        made = engine(lm, tiny_lm, dying, good)
        assert tokens(made.generate(CONTEXTS * 2, PARAMS)) == RIGHT * 2
        assert dying.requests
        assert good.requests
        dying.stop()
        assert tokens(made.generate(CONTEXTS * 2, PARAMS)) == RIGHT * 2
        made.sync(lm)
        assert made.asked == [made.endpoints[1]]
        assert "did not take the weights: no answer came" in made.endpoints[0].left_out
        good.stop()
        with pytest.raises(EngineError, match=rf"tries.*{good.url}.*refused"):
            made.generate(CONTEXTS, PARAMS)
        with pytest.raises(EngineError, match=r"no server took the weights of sync 3.*refused"):
            made.sync(lm)


def test_weights_go_by_a_folder_under_a_version_of_this_run(lm, tiny_lm, tmp_path):
    seen: list[bool] = []

    def look(server: FakeVLLM, path: str, body: dict) -> None:
        if body.get("method") == "lit_load":
            seen.append((Path(body["args"][0]) / "model.safetensors").is_file())

    with FakeVLLM(look) as server, FakeVLLM() as other:
        made = engine(lm, tiny_lm, server, folder=str(tmp_path))
        assert (made.version, server.num_resets, seen) == (1, 1, [True])
        assert Path(server.folders[0]).is_relative_to(tmp_path)
        assert not list(tmp_path.rglob("*.safetensors"))  # read, so gone
        made.sync(lm)
        assert (made.version, server.num_resets, seen) == (2, 2, [True, True])
        engine(lm, tiny_lm, other)
        assert server.version.endswith(".2")
        assert other.version.endswith(".1")
        assert server.version.split(".")[0] != other.version.split(".")[0]
        made.close()
        assert not list(tmp_path.iterdir())


def test_stale_weights_end_the_run(lm, tiny_lm):
    with FakeVLLM() as server:
        made = engine(lm, tiny_lm, server)
        handed, server.version = server.version, ""  # as after a restart
        with pytest.raises(EngineError, match=rf"{server.url}.*stale weights: version {handed}.*started with"):
            made.generate(CONTEXTS, PARAMS)
        server.version = "deadbeef.1"  # somebody else's
        made.sync(lm)
        server.version = "deadbeef.1"
        with pytest.raises(EngineError, match=r"samples from deadbeef.1"):
            made.generate(CONTEXTS, PARAMS)


def test_answers_from_stale_weights_do_not_count_where_another_server_has_the_right_ones(lm, tiny_lm, caplog):
    with FakeVLLM() as stale, FakeVLLM() as good:
        made = engine(lm, tiny_lm, stale, good)
        stale.version = ""
        stale.fault = only(COMPLETIONS, changed(token_ids=[1, 1, 1, 1]))
        assert tokens(made.generate(CONTEXTS, PARAMS)) == RIGHT
        assert "stale weights" in caplog.text
        assert made.asked == [made.endpoints[1]]


def test_a_server_that_says_it_took_the_weights_and_did_not(lm, tiny_lm):
    swallow = only(
        "/collective_rpc",
        lambda s, p, b: raw(b'{"results": [{"version": "", "logprobs_mode": "processed_logprobs"}]}')(s, p, b),
    )
    with FakeVLLM(swallow) as server, pytest.raises(EngineError, match=r"no server took.*stale weights"):
        engine(lm, tiny_lm, server)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(404, "Not Found"), r"404.*serve-vllm"),
        (status(500, "no attribute lit_load"), r"500.*serve-vllm"),
        (raw(b'{"results": ["None"]}'), r"serve-vllm"),
        (raw(b'{"results": [{"error": "no room"}]}'), "no room"),
        (raw(b'{"results": [{"version": "1"}, {"version": "2"}]}'), "disagree"),
    ],
)
def test_a_server_without_the_worker_says_how_to_start_it(lm, tiny_lm, fault, said):
    with FakeVLLM(only("/collective_rpc", fault)) as server, pytest.raises(EngineError, match=said):
        engine(lm, tiny_lm, server)


def test_a_server_with_other_log_probabilities_is_refused(lm, tiny_lm):
    with FakeVLLM(logprobs_mode="raw_logprobs") as server, pytest.raises(EngineError, match="gives raw_logprobs"):
        engine(lm, tiny_lm, server)


def test_keys_and_values_that_are_not_forgotten(lm, tiny_lm):
    busy = raw(b'{"success": false}')
    with FakeVLLM(only("/reset_prefix_cache", first(2, busy))) as server:
        engine(lm, tiny_lm, server)
        assert server.num_resets == 1
    with FakeVLLM(only("/reset_prefix_cache", busy)) as server, pytest.raises(EngineError, match="does not forget"):
        engine(lm, tiny_lm, server, sync_timeout=0.5)


def test_adapters_are_asked_for_by_their_version(tiny_lm):
    lm = load_policy(tiny_lm, lora=Lora(r=4))
    with FakeVLLM() as server:
        made = engine(lm, tiny_lm, server, sync="adapter")
        one = list(server.adapters)
        assert (Path(server.folders[0]) / "adapter_model.safetensors").is_file()
        assert tokens(made.generate(CONTEXTS, PARAMS)) == RIGHT
        assert {body["model"] for body in server.requests} == set(one)
        made.sync(lm)
        assert len(server.adapters) == 1
        assert server.adapters != one
        assert made.fingerprint() is None
        server.adapters.clear()  # a restart
        with pytest.raises(EngineError, match=r"404.*does not exist"):
            made.generate(CONTEXTS, PARAMS)
        made.close()


def test_fingerprints_of_all_servers_have_to_agree(lm, tiny_lm):
    with FakeVLLM() as one, FakeVLLM() as two:
        made = engine(lm, tiny_lm, one, two)
        assert made.fingerprint() == Fingerprint(3, 1.5, 2.25)
        two.fingerprint = {"count": 3, "total": 1.0, "squares": 2.25}
        with pytest.raises(EngineError, match="different weights"):
            made.fingerprint()
        one.fingerprint = two.fingerprint = {"unknown": "packed"}
        assert made.fingerprint() is None


def test_what_cannot_be_is_refused(lm, tiny_lm, caplog):
    with pytest.raises(UserError, match="urls="):
        VLLMServer([])
    with pytest.raises(UserError, match="each once"):
        VLLMServer(["http://a:1", "http://a:1"])
    for url in ("127.0.0.1:8000", "ftp://a", "http://a b", "http://user@a", "http://a?x=1", "http://[", "", "http://ä"):
        with pytest.raises(UserError, match="no address"):
            VLLMServer([url])
    for option in ({"timeout": 0}, {"retries": -1}, {"max_concurrency": 0}, {"sync": "half"}):
        with pytest.raises(UserError):
            VLLMServer(**option)  # type: ignore[arg-type]
    unsynced = VLLMServer()
    with pytest.raises(UserError, match="call sync"):
        unsynced.generate(CONTEXTS, PARAMS)
    with pytest.raises(UserError, match="use_tokenizer"):
        unsynced.sync(lm)
    with FakeVLLM() as server:
        made = engine(lm, tiny_lm, server)
        with pytest.raises(UserError, match="needs a policy with a LoRA"):
            engine(lm, tiny_lm, server, sync="adapter")
        with pytest.raises(UserError, match="images"):
            made.generate([[5]], PARAMS, images=[["x.png"]])  # type: ignore[list-item]
        with pytest.raises(UserError, match="token id 300"):
            made.generate([[300]], PARAMS)
        with pytest.raises(UserError, match="512"):
            made.generate([[5] * 510], PARAMS)
        with pytest.raises(UserError, match=r"temperature=0.001"):
            made.generate([[5]], SamplingParams(temperature=0.001))
        assert made.generate([], PARAMS) == []
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                made.generate([[5]], SamplingParams(max_new_tokens=4, top_p=0.9))
    assert caplog.text.count("truncated distribution") == 1


def test_log_probabilities_of_other_kernels_are_warned_of_where_they_are_trained_on(tiny_lm, caplog):
    for engine, option in ((HFEngine(), "sampler"), (VLLMServer(), "auto"), (VLLMServer(), "recompute")):
        warn_of_kernels(RolloutDataModule(EchoSuite(), tiny_lm, engine), option)
    assert caplog.text == ""
    warn_of_kernels(RolloutDataModule(EchoSuite(), tiny_lm, VLLMServer()), "sampler")
    assert "model.old_logprobs=sampler with VLLMServer" in caplog.text


def test_addresses():
    assert str(Address.parse("http://127.0.0.1:8000/v1/")) == "http://127.0.0.1:8000"
    assert str(Address.parse("https://[::1]/behind/v1")) == "https://[::1]:443/behind"
