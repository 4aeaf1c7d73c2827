"""Transformers' continuous batching as an engine: the same answers as `HFEngine`, seed for seed.

What holds for every engine is in test_engines.py.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_parts import (
    GREEDY,
    SAMPLED,
    build,
    engine_of,
    paged,
    random_contexts,
    reference,
    tokens_of,
)
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts import ContinuousBatchingEngine
from lit_agentrl.rollouts.seeded_sampler import SeededSampler
from lit_agentrl.types import SamplingParams
from runs import fit, metrics
from tiny import build_tiny_lm, byte_tokenizer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("llama", GREEDY),
        ("llama", SamplingParams(temperature=1.3, top_k=5, max_new_tokens=12)),
        ("llama", SamplingParams(top_p=0.6, max_new_tokens=12)),
        ("qwen2-sliding", SAMPLED),
        ("gemma3-sliding", SAMPLED),
    ],
)
def test_tokens_and_logprobs_are_those_of_hf_engine(family: str, params: SamplingParams) -> None:
    """Ragged contexts, some longer than a forward or equal; the log-probabilities are not renormalised to top-k."""
    lm, contexts = build(family), [*random_contexts(5, 70, 17, 90), *random_contexts(40) * 2]
    expected = engine_of(lm).generate(contexts, params, seeds=range(6))
    found = paged(lm).generate(contexts, params, seeds=range(6))
    assert tokens_of(found) == tokens_of(expected)
    assert [completion.finish for completion in found] == ["length"] * 6
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=2e-5)


def test_action_does_not_depend_on_evictions() -> None:
    """With room for so few pages that sequences are thrown out and computed again."""
    lm, contexts = build(), random_contexts(20, 9, 33) * 3
    params = SamplingParams(temperature=0.9, max_new_tokens=40)
    expected = tokens_of(engine_of(lm).generate(contexts, params, seeds=range(9)))
    with evictions() as evicted:
        answers = paged(lm, max_cached_tokens=160).generate(contexts, params, seeds=range(9))
    assert tokens_of(answers) == expected
    assert [len(answer.logprobs) for answer in answers] == [40] * 9
    assert evicted


class evictions:
    """Counts the requests that lose their pages."""

    def __enter__(self) -> list[str]:
        from transformers.generation.continuous_batching.requests import RequestState

        evicted: list[str] = []
        self.patch = pytest.MonkeyPatch()
        own = RequestState.create_equivalent_initial_request

        def counted(state: RequestState) -> RequestState:
            evicted.append(state.request_id)
            return own(state)

        self.patch.setattr(RequestState, "create_equivalent_initial_request", counted)
        return evicted

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def test_whole_pages_of_earlier_turns_are_not_computed_again() -> None:
    """A page is 16 tokens: of 50 + 12 + 6 known tokens four pages are whole; a `sync` forgets them."""
    lm, (prompt,) = build(), random_contexts(50)
    engine = paged(lm)
    first = engine.generate([prompt], GREEDY)[0]
    assert (first.num_cached, first.num_prefilled) == (0, 50)
    context = prompt + first.token_ids + [5, 6, 7, 8, 9, 10]
    second = engine.generate([context], GREEDY)[0]
    assert (second.num_cached, second.num_prefilled) == (48, 20)  # the action's last token is never fed
    assert second.token_ids == reference(lm, context, 12)
    engine.sync(lm)
    assert engine.generate([context], GREEDY)[0].num_cached == 0
    alone = paged(lm, share_prefixes=False)
    assert [alone.generate([context], GREEDY)[0].num_cached for _ in range(2)] == [0, 0]


def test_stop_strings_end_actions_as_in_hf_engine(tmp_path: Path) -> None:
    """Among many sampled texts, two letters end some early; cancelled requests take nothing from the others."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(build_tiny_lm(str(tmp_path)))
    tokenizer = byte_tokenizer()
    context = tokenizer("say a word")["input_ids"]
    params = SamplingParams(max_new_tokens=40, stop=("a", "zz", "e!"))
    engines = engine_of(lm), paged(lm)
    for engine in engines:
        engine.use_tokenizer(tokenizer)
    expected, found = (engine.generate([context] * 16, params, seeds=range(16)) for engine in engines)
    assert tokens_of(found) == tokens_of(expected)
    assert [each.finish for each in found] == [each.finish for each in expected]
    assert [len(each.logprobs) for each in found] == [len(each.token_ids) for each in found]
    assert {each.finish for each in found} == {"stop", "length"}
    again = engines[1].generate([context] * 16, params, seeds=range(16))
    assert tokens_of(again) == tokens_of(expected)


def test_interrupted_call_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it waits: the thread ends (the fixture looks), and the engine answers again."""
    from lit_agentrl.rollouts import paged_session

    lm, (context,) = build(), random_contexts(20)
    engine = paged(lm)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(paged_session, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([context] * 4, SAMPLED)
    assert engine.generate([context], GREEDY)[0].token_ids == reference(lm, context, 12)


def test_what_it_cannot_do_is_refused_in_words(tmp_path: Path) -> None:
    lm = build()
    with pytest.raises(UserError, match="max_batch_tokens=0"):
        ContinuousBatchingEngine(max_batch_tokens=0)
    with pytest.raises(UserError, match="no room for one page"):
        ContinuousBatchingEngine(max_cached_tokens=100)
    with pytest.raises(UserError, match="page_size=1"):
        ContinuousBatchingEngine(page_size=1)
    with pytest.raises(UserError, match="may have 72 tokens, but ContinuousBatchingEngine has max_cached_tokens=64"):
        paged(lm, max_cached_tokens=64).generate([[3] * 60], SAMPLED)
    with pytest.raises(UserError, match="is for text"):
        paged(lm).generate([[3]], SAMPLED, images=[[np.zeros((4, 4, 3), np.uint8)]])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="autocast"):
        paged(lm).generate([[3]], SAMPLED)
    with pytest.raises(UserError, match=r"cannot run MambaForCausalLM.*HFEngine"):
        paged(build("mamba")).generate([[3]], SAMPLED)


def test_cache_that_does_not_fit_the_memory_is_refused() -> None:
    """Terabytes of keys and values: before it is taken, and with what to lower."""
    with pytest.raises(UserError, match="Lower max_cached_tokens"):
        paged(build(), max_cached_tokens=2**33).generate([[3]], SAMPLED)


def test_memory_is_held_until_sync_or_close() -> None:
    """The cap is what is taken: 2 (keys and values) x 3 layers x 2 heads x 8 numbers x 4 bytes a token."""
    lm = build()
    engine = paged(lm, max_cached_tokens=512)
    engine.generate([[3, 4]], SAMPLED)
    session = engine._session
    assert session is not None
    cache = session._manager.batch_processor.cache
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(cache))
    assert 512 <= taken / (2 * 3 * 2 * 8 * 4) <= 512 + 4 * 16  # and a few pages that nothing reads
    engine.generate([[3, 4]], SAMPLED)
    assert engine._session is session
    engine.generate([[3, 4]], GREEDY)  # another way to sample is another session
    assert engine._session is not session
    engine.close()
    assert engine._session is None


def tensors_of(cache: object) -> list[torch.Tensor]:
    """What a paged cache holds keys and values in, each memory once."""
    found: dict[int, torch.Tensor] = {}
    todo, seen = [cache], set()
    while todo:
        each = todo.pop()
        if isinstance(each, torch.Tensor):
            base = each if each._base is None else each._base
            found[base.data_ptr()] = base
        elif isinstance(each, list | tuple):
            todo += each
        elif isinstance(each, dict):
            todo += each.values()
        elif hasattr(each, "__dict__") and id(each) not in seen and "cache" in type(each).__module__:
            seen.add(id(each))
            todo += vars(each).values()
    return list(found.values())


def test_float64_numbers_reach_the_device_whole() -> None:
    """Two int32 rows are one float64: numbers closer than float32 can tell draw two tokens."""
    sampler = SeededSampler(SamplingParams())
    storage = torch.zeros(2, 4, dtype=torch.int32)
    sampler.fill_defaults(storage[:, :1])
    assert storage[:, 0].clone().view(torch.float64).item() == 0.5
    edge = 0.5  # of two equally likely tokens
    numbers = [torch.tensor([edge + step * 2.0**-40], dtype=torch.float64) for step in (-1, 1)]
    assert numbers[0].float() == numbers[1].float()
    for index, number in enumerate(numbers):
        sampler.add(str(index), 1, number)
    requests = [Scheduled(Request(str(index))) for index in range(2)]
    sampler.prepare_tensor_args(requests, storage)
    sampler(torch.zeros(2), torch.zeros(2, 2), storage[:, :2])
    output = torch.zeros(2, 4, dtype=torch.int32)
    sampler.write(torch.zeros(1, 2, 2), output)
    assert output[0, :2].tolist() == [0, 1]
    assert output[1, :2].contiguous().view(torch.float32).tolist() == pytest.approx([-0.6931472] * 2)
    assert [sampler.pop(str(index)) for index in range(2)] == [0, 0]
    assert all(a is not b for a, b in pairwise(requests))


class Request:
    def __init__(self, request_id: str) -> None:
        self.request_id, self.position_offset = request_id, 1


class Scheduled:
    has_new_token, query_length = True, 1

    def __init__(self, state: Request) -> None:
        self.state = state


@pytest.mark.slow
def test_a_fit_with_it_equals_one_with_hf_engine(tiny_lm: str, tmp_path: Path) -> None:
    """Two iterations with a LoRA policy and evaluations: the same transcripts and losses, whichever engine samples."""
    found = {}
    for engine in ("HFEngine", "ContinuousBatchingEngine"):
        fit(tiny_lm, tmp_path / engine, "--data.engine", engine)
        rows = [row for row in metrics(tmp_path / engine) if row.get("train/loss")]
        transcripts = sorted((tmp_path / engine / "transcripts").iterdir())
        actions = [
            [step["action"] for step in json.loads(line)["steps"]]
            for path in transcripts
            for line in path.read_text().splitlines()
        ]
        found[engine] = [float(row["train/loss"]) for row in rows], actions
    ours, theirs = found.values()
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[1] == theirs[1]
    assert len(ours[0]) == 2
