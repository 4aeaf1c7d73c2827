"""How the in-process engine shares, batches and forgets; what holds for every engine is in test_engines.py."""

import subprocess
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from engine_parts import (
    FAMILIES,
    GREEDY,
    PLAIN,
    SAMPLED,
    build,
    engine_of,
    forwards,
    full_logprobs,
    random_contexts,
    reference,
    tokens_of,
)
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.engine import rollout_seed, uniforms
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.kv_cache import KVRows
from lit_agentrl.rollouts.prefill import shared_prefixes
from lit_agentrl.rollouts.prefix_store import PrefixStore, RetainedRow, pack
from lit_agentrl.rollouts.sampling import inverse_cdf, sample_tokens
from lit_agentrl.types import SamplingParams

# --- the tokens are the model's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_over_ragged_turns(family: str) -> None:
    """Contexts of many lengths with common starts, then two more turns on top: token by token what `generate` gives."""
    lm = build(family)
    long, *others = random_contexts(45, 3, 20, 1)
    contexts = [long, long[:40] + others[0], *others, long]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = HFEngine(stop_token_ids=[])
        engine.sync(lm)
        for turn in range(3):
            completions = engine.generate(contexts, GREEDY)
            assert tokens_of(completions) == [reference(lm, context, 12) for context in contexts]
            for context, completion in zip(contexts, completions, strict=True):
                assert completion.num_cached + completion.num_prefilled == len(context)
            contexts = [
                [*c, *a.token_ids, *random_contexts(5, seed=turn)[0]]
                for c, a in zip(contexts, completions, strict=True)
            ]
    engine_warnings = [str(w.message) for w in caught if "HFEngine" in str(w.message)]
    assert len(engine_warnings) == (family in PLAIN), engine_warnings
    assert (sum(c.num_cached for c in completions) == 0) == (family in PLAIN)


def test_uninitialised_memory_never_reaches_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns between a row's tokens take part in the attention with weight 0, and 0 x NaN would be NaN."""
    lm = build()
    contexts = random_contexts(40, 3, 20)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: tensor.new_full(size, float("nan")))
    engine = engine_of(lm)
    for turn in range(2):
        completions = engine.generate(contexts, GREEDY)
        assert tokens_of(completions) == [reference(lm, context, 12) for context in contexts]
        replies = random_contexts(1, 9, 4, seed=turn)
        contexts = [[*c, *a.token_ids, *r] for c, a, r in zip(contexts, completions, replies, strict=True)]


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "mistral-sliding"])
def test_every_query_sees_something(family: str) -> None:
    """Also in the padding of a ragged prefill: a half-precision softmax over nothing is NaN, which would be cached."""
    lm = build(family)
    engine = engine_of(lm)
    seen: list[bool] = []

    def look(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, dict[str, torch.Tensor] | torch.Tensor]) -> None:
        masks = kwargs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            seen.append(bool((mask.amax(-1) == 0).all()))

    handle = lm.register_forward_pre_hook(look, with_kwargs=True)
    engine.generate(random_contexts(40, 33, 20), SAMPLED)
    handle.remove()
    assert seen
    assert all(seen)


def test_long_prefills_and_big_jobs_are_split_without_changing_tokens() -> None:
    lm = build()
    contexts = random_contexts(90, 80, 33, 5, 5, 70)
    whole = engine_of(lm).generate(contexts, SAMPLED, seeds=range(6))
    split = engine_of(lm, max_prefill_tokens=16, max_batch_size=2, max_batch_tokens=120)
    with forwards(lm) as shapes:
        assert tokens_of(split.generate(contexts, SAMPLED, seeds=range(6))) == tokens_of(whole)
    assert max(rows * columns for rows, columns in shapes) <= 16
    assert max(rows for rows, _ in shapes) == 2


# --- randomness -------------------------------------------------------------------------------------------------------


def test_longer_action_begins_like_the_shorter_one() -> None:
    lm, contexts = build(), random_contexts(10)
    short, long = (
        engine_of(lm).generate(contexts, SamplingParams(max_new_tokens=n), seeds=[3])[0].token_ids for n in (5, 15)
    )
    assert long[:5] == short


def test_uniforms_and_seeds_never_change() -> None:
    """Golden values, and the same in a process with another hash seed: old runs must replay."""
    assert rollout_seed(1, 2, "task-3", 4, 5) == 1717343047165916952
    assert rollout_seed(1, 2, 3, 4, 5) != rollout_seed(1, 2, "3", 4, 5) != rollout_seed(1, 23, "", 4, 5)
    expected = uniforms([7, 2**64 - 1], 3)
    np.testing.assert_allclose(
        expected[0], [0.8720734548204873, 0.29536538151378355, 0.4200976785072422], rtol=0, atol=0
    )
    np.testing.assert_array_equal(uniforms([2**64 - 1, 7], 5)[::-1, :3], expected)
    code = "from lit_agentrl.rollouts.engine import *; print(rollout_seed(1, 2, 'task-3', 4, 5))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(process.stdout) == rollout_seed(1, 2, "task-3", 4, 5)


def test_frequencies_follow_the_softmax() -> None:
    """40,000 draws at temperature 0.8, chi-square below its 0.999 quantile; top-k and top-p keep to their sets."""
    num_draws = 40_000
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).mul(1.5)
    probabilities = (logits[0] / 0.8).softmax(-1).double()
    drawn = torch.from_numpy(uniforms(range(num_draws), 1))[:, 0]

    def counts(**limits: float) -> torch.Tensor:
        params = SamplingParams(temperature=0.8, **limits)
        return sample_tokens(logits.expand(num_draws, -1), params, drawn)[0].bincount(minlength=20).double()

    def chi_square(seen: torch.Tensor, kept: torch.Tensor) -> float:
        expected = num_draws * probabilities[kept] / probabilities[kept].sum()
        return float(((seen[kept] - expected) ** 2 / expected).sum())

    order = probabilities.argsort(descending=True)
    assert chi_square(counts(), order) < 43.8  # 19 degrees of freedom
    best = order[:5]
    only_best = counts(top_k=5)
    assert only_best[best].sum() == num_draws
    assert chi_square(only_best, best) < 18.5  # 4 degrees of freedom
    nucleus = order[: int((probabilities[order].cumsum(0) < 0.6).sum()) + 1]
    assert counts(top_p=0.6).nonzero()[:, 0].tolist() == sorted(nucleus.tolist())


@pytest.mark.parametrize("size", [1, 5, 256, 257, 1000])
def test_inverse_cdf_equals_a_plain_cumulative_sum(size: int) -> None:
    """Zero weights are never drawn, not even with the smallest and largest uniform numbers."""
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(64, size, generator=generator)
    weights[:, 1:] *= torch.rand(64, size - 1, generator=generator) < 0.3
    weights[:, 0] += 0.01
    drawn = torch.rand(64, generator=generator, dtype=torch.float64)
    drawn[:2] = torch.tensor([2.0**-54, 1 - 2.0**-53])
    cumulative = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, (drawn * cumulative[:, -1])[:, None])[:, 0]
    tokens = inverse_cdf(weights, drawn)
    assert tokens.tolist() == expected.tolist()
    assert weights.gather(1, tokens[:, None]).min() > 0


# --- what is computed -------------------------------------------------------------------------------------------------


def test_group_prompt_is_prefilled_once() -> None:
    lm = build()
    engine = engine_of(lm)
    (prompt,) = random_contexts(50)
    with forwards(lm) as shapes:
        completions = engine.generate([prompt] * 8, SAMPLED)
    assert shapes == [(1, 50)] + [(8, 1)] * 11  # the last sampled token is never fed
    assert [(c.num_prefilled, c.num_cached) for c in completions] == [(50, 0)] + [(0, 50)] * 7


def test_system_prompt_of_different_contexts_is_prefilled_once() -> None:
    lm = build()
    engine = engine_of(lm)
    system, *tasks = random_contexts(40, 10, 10, 9)
    with forwards(lm) as shapes:
        completions = engine.generate([system + task for task in tasks], SAMPLED)
    assert shapes == [(1, 40), (3, 10)] + [(3, 1)] * 11
    assert [c.num_prefilled for c in completions] == [50, 10, 9]


def test_context_that_others_begin_with_is_computed_once() -> None:
    engine = engine_of(build())
    (context,) = random_contexts(60)
    completions = engine.generate([context[:50], context, [*context[:50], 3]], SAMPLED)
    assert [(c.num_cached, c.num_prefilled) for c in completions] == [(0, 50), (49, 11), (49, 2)]


def test_later_turn_prefills_only_new_tokens() -> None:
    """The context, what was sampled on it and a reply: all but the reply and the last sampled token are there."""
    lm = build()
    engine = engine_of(lm)
    first = random_contexts(50, 30)
    completions = engine.generate(first, SAMPLED)
    second = [context + c.token_ids + [9] * 4 for context, c in zip(first, completions, strict=True)]
    with forwards(lm) as shapes:
        completions = engine.generate(second, SAMPLED)
    assert shapes == [(2, 5)] + [(2, 1)] * 11
    assert [(c.num_cached, c.num_prefilled) for c in completions] == [(61, 5), (41, 5)]


def test_branch_starts_from_the_longest_retained_prefix() -> None:
    """Going back into an earlier turn (tree search) reuses the part that is still true."""
    engine = engine_of(build())
    (context,) = random_contexts(50)
    action = engine.generate([context], SAMPLED)[0].token_ids
    branch = engine.generate([context + action[:6] + [3, 4]], SAMPLED)[0]
    assert (branch.num_cached, branch.num_prefilled) == (56 + (action[6] == 3), 2 - (action[6] == 3))


def test_finished_sequences_leave_the_batch() -> None:
    """Each sequence of a greedy batch stops on its own token; its row is not computed on, and it stays retained."""
    lm = build()
    contexts = random_contexts(21, 9, 14, 30)
    answers = [reference(lm, context, 12) for context in contexts]
    stops = {answers[0][2], answers[3][6]}
    expected = [next((a[: i + 1] for i, token in enumerate(a) if token in stops), a) for a in answers]
    assert len({len(tokens) for tokens in expected}) > 1
    engine = engine_of(lm, stop_token_ids=sorted(stops))
    with forwards(lm) as shapes:
        completions = engine.generate(contexts, GREEDY)
    assert tokens_of(completions) == expected
    assert [c.finish for c in completions] == ["stop" if c.token_ids[-1] in stops else "length" for c in completions]
    decoded = [rows for rows, columns in shapes if columns == 1]
    assert decoded == [sum(len(tokens) > step for tokens in expected) for step in range(1, max(map(len, expected)))]

    later = [[*context, *tokens, 5] for context, tokens in zip(contexts, expected, strict=True)]
    engine.stop_token_ids = []
    completions = engine.generate(later, GREEDY)
    assert [c.num_prefilled for c in completions] == [2] * 4
    assert tokens_of(completions) == [reference(lm, context, 12) for context in later]


# --- the store --------------------------------------------------------------------------------------------------------


def test_store_is_bounded_and_evicts_the_oldest() -> None:
    engine = engine_of(build(), max_cached_tokens=150)
    contexts = random_contexts(50, 51, 52)
    for context in contexts:
        engine.generate([context], SAMPLED)
        assert 0 < engine.num_cached_tokens <= 150
    oldest, newest = (engine.generate([[*contexts[i], 3]], SAMPLED)[0].num_cached for i in (0, 2))
    assert oldest < 10
    assert newest == 52


def test_store_evicts_what_was_used_longest_ago() -> None:
    store = PrefixStore(20)
    for token in range(3):
        store.add([RetainedRow(pack([token] * 9), KVRows(1, 10, np.arange(10)), 0, np.arange(9))])
    assert store.longest_prefix(pack([0, 0, 1]))[1] == 2
    store.evict()
    assert [store.longest_prefix(pack([token] * 5))[1] for token in range(3)] == [5, 0, 5]


def test_nothing_is_kept_with_an_empty_store() -> None:
    lm, contexts = build(), random_contexts(50, 20)
    engine = engine_of(lm, max_cached_tokens=0)
    for _ in range(2):
        completions = engine.generate(contexts, GREEDY)
        assert tokens_of(completions) == [reference(lm, context, 12) for context in contexts]
        assert [c.num_prefilled for c in completions] == [50, 20]
        assert engine.num_cached_tokens == 0


def test_store_finds_the_longest_prefix() -> None:
    """Against a search of everything, on short random sequences of three tokens."""
    generator = np.random.default_rng(0)
    store, kept = PrefixStore(10**6), []
    for _ in range(30):
        rows = [generator.integers(0, 3, generator.integers(1, 9)).tolist() for _ in range(4)]
        kv = KVRows(4, 9, np.arange(9))
        store.add(RetainedRow(pack(row), kv, i, np.arange(len(row))) for i, row in enumerate(rows))
        kept += rows
        wanted = generator.integers(0, 3, 10).tolist()
        found, length = store.longest_prefix(pack(wanted))
        expected = max(next((i for i in range(len(row)) if row[i] != wanted[i]), len(row)) for row in kept)
        assert length == expected
        assert (found is None) == (length == 0)
        assert found is None or found.key[: 4 * length] == pack(wanted[:length])


def test_columns_that_early_stops_left_unused_are_given_back() -> None:
    lm, (context,) = build(), random_contexts(50)
    stop, second = reference(lm, context, 2)
    engine = engine_of(lm, stop_token_ids=[stop])
    params = SamplingParams(temperature=0, max_new_tokens=100)
    assert engine.generate([context] * 4, params)[0].token_ids == [stop]
    assert engine.num_cached_tokens == 4 * 50
    engine.stop_token_ids = []
    later = engine.generate([[*context, stop]], SamplingParams(temperature=0, max_new_tokens=1))[0]
    assert (later.num_cached, later.token_ids) == (50, [second])


def test_rows_that_others_begin_with_free_their_buffer() -> None:
    engine = engine_of(build())
    (context,) = random_contexts(20)
    for _ in range(4):
        action = engine.generate([context], SAMPLED)[0].token_ids
        context = context + action
    assert engine.num_cached_tokens == len(context) - 1


def test_shared_prefixes_are_planned_in_waves() -> None:
    """A system prompt of 40, below it a task prompt of 30 for two of the three contexts, then 5 tokens each."""
    system, task, other = [1] * 40, [2] * 30, [3] * 30
    contexts = sorted(pack(tokens) for tokens in (system + task + [4] * 5, system + task + [5] * 5, system + other))
    waves = shared_prefixes(contexts, [0, 0, 0])
    assert waves == [[(pack(system), range(0, 3))]]  # 30 tokens saved once are fewer than an extra forward costs
    waves = shared_prefixes(contexts, [40, 40, 40])
    assert waves == []
    more = sorted([*contexts, pack(system + task + [6] * 5)])
    assert shared_prefixes(more, [0] * 4) == [[(pack(system), range(0, 4))], [(pack(system + task), range(0, 3))]]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_sync_empties_the_store() -> None:
    lm = build()
    engine = engine_of(lm)
    engine.generate(random_contexts(30), GREEDY)
    assert engine.num_cached_tokens > 0
    engine.sync(lm)
    assert engine.num_cached_tokens == 0


@pytest.mark.parametrize("fails", [False, True])
def test_forwards_are_in_evaluation_mode_and_grouped(fails: bool) -> None:
    """Also the one that fails."""
    lm = build().train()
    engine = engine_of(lm)
    seen: list[tuple[bool, str]] = []
    lm.register_forward_pre_hook(lambda module, _: seen.append((module.training, module.config._attn_implementation)))
    if fails:
        lm.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        engine.generate([[3, 4]], SAMPLED)
    assert set(seen) == {(False, "lit_agentrl_grouped")}


def test_autocast_of_the_caller_is_respected() -> None:
    """Keys, values and masks take the dtype that the forward really uses."""
    lm, (context,) = build(), random_contexts(30)
    engine = engine_of(lm)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = engine.generate([context] * 2, GREEDY)[0].token_ids
        assert torch.is_autocast_enabled("cpu")
        expected = full_logprobs(lm, context, tokens)
    engine.sync(lm)
    assert expected.dtype == torch.float32
    assert engine.generate([context], GREEDY)[0].token_ids == reference(lm, context, 12)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="max_batch_size=0"):
        HFEngine(max_batch_size=0)
