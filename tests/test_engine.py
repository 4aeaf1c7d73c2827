"""The in-process engine samples what the model would, whatever it shares, batches and forgets."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.engine import NonFiniteLogitsError, rollout_seed, uniforms
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.kv_cache import KVRows
from lit_agentrl.rollouts.prefill import shared_prefixes
from lit_agentrl.rollouts.prefix_store import PrefixStore, RetainedRow, pack
from lit_agentrl.rollouts.sampling import inverse_cdf, sample_tokens
from lit_agentrl.types import Completion, SamplingParams

VOCABULARY, POSITIONS, WINDOW = 97, 192, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.25,  # wide enough that attention decides the next token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, max_new_tokens=12)
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]


class StubbornLlama(LlamaForCausalLM):
    """Counts positions itself, from the columns of its cache."""

    def forward(self, *args: object, position_ids: torch.Tensor | None = None, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


class StubbornMistral(MistralForCausalLM):
    """The same, with a sliding window in every layer."""

    def forward(self, *args: object, position_ids: torch.Tensor | None = None, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gemma2-softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=WINDOW, attn_implementation="eager")
    ),
    "gemma3-sliding": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW, layer_types=LAYERS)
    ),
    "llama-own-positions": lambda: StubbornLlama(LlamaConfig(**SIZES)),
    "mistral-sliding-own-positions": lambda: StubbornMistral(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "bloom-alibi": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=4, initializer_range=0.25)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=False, eos_token_id=None
        )
    ),
}
PLAIN = {"llama-own-positions", "mistral-sliding-own-positions", "bloom-alibi", "mamba"}


def build(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def engine_of(lm: nn.Module, **options: object) -> HFEngine:
    """A synced engine that has looked at the model already, so that forwards can be counted."""
    engine = HFEngine(**{"stop_token_ids": [], **options})
    engine.sync(lm)
    engine.generate([[3]], SamplingParams(max_new_tokens=1))
    engine.sync(lm)
    return engine


def random_contexts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


def reference(lm: PreTrainedModel, context: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers itself, one sequence at a time."""
    ids = torch.tensor([context])  # with its mask: transformers would hide tokens that equal the padding token
    output = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(context) :].tolist()


def full_logprobs(lm: PreTrainedModel, context: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([context + tokens]), use_cache=False).logits[0, len(context) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)[range(len(tokens)), tokens]


@contextmanager
def forwards(lm: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes [r, q] of the token ids of every forward."""
    shapes: list[tuple[int, ...]] = []
    handle = lm.register_forward_pre_hook(
        lambda _, __, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


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


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2-softcap", "mamba"])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
@pytest.mark.filterwarnings("ignore:HFEngine cannot share")
def test_logprobs_are_those_of_a_plain_forward(family: str, temperature: float) -> None:
    """At the sampling temperature, at 1 for greedy, over the whole vocabulary though only 5 tokens may be drawn."""
    lm = build(family)
    contexts = random_contexts(30, 7, 30)
    params = SamplingParams(temperature=temperature, max_new_tokens=20, top_k=5, top_p=0.9)
    for context, completion in zip(contexts, engine_of(lm).generate(contexts, params), strict=True):
        expected = full_logprobs(lm, context, completion.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding"])
def test_lora_adapter_is_active(family: str) -> None:
    lm = build(family)
    plain = reference(lm, [5, 6, 7], 12)
    adapted = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    tokens = tokens_of(engine_of(adapted).generate([[5, 6, 7]] * 2, GREEDY))
    assert tokens == [reference(adapted, [5, 6, 7], 12)] * 2
    assert tokens[0] != plain


# --- randomness -------------------------------------------------------------------------------------------------------


def test_trajectory_does_not_depend_on_its_batch() -> None:
    """Alone, in a batch, in another order, on top of other retained rows: the seed decides."""
    lm = build()
    contexts = random_contexts(20, 9, 33) * 3
    seeds = [rollout_seed(0, 1, "prompt", index, 0) for index in range(9)]
    together = tokens_of(engine_of(lm).generate(contexts, SAMPLED, seeds))
    assert len(set(map(tuple, together))) == 9
    engine = engine_of(lm)
    alone = [
        engine.generate([context], SAMPLED, [seed])[0].token_ids for context, seed in zip(contexts, seeds, strict=True)
    ]
    backwards = engine_of(lm).generate(contexts[::-1], SAMPLED, seeds[::-1])
    assert together == alone == tokens_of(backwards)[::-1]


def test_longer_action_begins_like_the_shorter_one() -> None:
    lm, contexts = build(), random_contexts(10)
    short, long = (
        engine_of(lm).generate(contexts, SamplingParams(max_new_tokens=n), seeds=[3])[0].token_ids for n in (5, 15)
    )
    assert long[:5] == short


def test_calls_without_seeds_differ_and_repeat() -> None:
    def two_calls(seed: int) -> list[list[int]]:
        engine = engine_of(lm, seed=seed)
        return [tokens for _ in range(2) for tokens in tokens_of(engine.generate(contexts, SAMPLED))]

    lm, contexts = build(), random_contexts(10) * 2
    assert len(set(map(tuple, two_calls(0)))) == 4
    assert two_calls(0) == two_calls(0) != two_calls(1)


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


def test_stop_ids_come_from_the_model_unless_given() -> None:
    lm = build()
    (context,) = random_contexts(21)
    answer = reference(lm, context, 12)
    assert answer.index(answer[3]) == 3
    for ids, length in ((answer[3], 4), ([answer[1], answer[3]], 2), (None, 12)):
        lm.generation_config.eos_token_id = ids
        lm.config.eos_token_id = None
        engine = HFEngine()
        engine.sync(lm)
        completion = engine.generate([context], GREEDY)[0]
        assert completion.token_ids == answer[:length]
        assert completion.finish == ("length" if ids is None else "stop")
    lm.config.eos_token_id = answer[0]
    assert engine.generate([context], GREEDY)[0].token_ids == answer[:1]


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


class Policy(nn.Module):
    """A wrapper as the training modules have one."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm


def test_sync_brings_new_weights_and_forgets_the_old_keys() -> None:
    lm, (context,) = build(), random_contexts(30)
    engine = engine_of(Policy(lm))
    before = engine.generate([context], GREEDY)[0]
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.2)
    engine.sync(Policy(lm))
    assert engine.num_cached_tokens == 0
    after = engine.generate([context], GREEDY)[0]
    assert after.num_cached == 0
    assert after.token_ids == reference(lm, context, 12) != before.token_ids
    other = build(seed=1)
    engine.sync(other)
    assert engine.generate([context], GREEDY)[0].token_ids == reference(other, context, 12)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails: bool) -> None:
    """Training flags of every module, the attention implementation and gradients, also after an exception."""
    lm = build().train()
    lm.model.layers[1].eval()
    flags = [module.training for module in lm.modules()]
    engine = engine_of(lm)
    seen: list[tuple[bool, str]] = []
    with forwards(lm):
        handle = lm.register_forward_pre_hook(
            lambda module, _: seen.append((module.training, module.config._attn_implementation))
        )
        if fails:
            failing = lm.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.generate([[3, 4]], SAMPLED)
            failing.remove()
        else:
            engine.generate([[3, 4]], SAMPLED)
        handle.remove()
    assert set(seen) == {(False, "lit_agentrl_grouped")}
    assert [module.training for module in lm.modules()] == flags
    assert lm.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
    lm(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert lm.lm_head.weight.grad is not None
    assert engine.generate([[3, 4]], GREEDY)[0].token_ids == reference(lm.eval(), [3, 4], 12)


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


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.filterwarnings("ignore:HFEngine cannot share")
def test_logits_that_are_not_finite_are_an_error(family: str) -> None:
    lm = build(family)
    engine = engine_of(lm)
    with torch.no_grad():
        lm.get_input_embeddings().weight[7] = float("nan")
    assert engine.generate([[5, 6]], SamplingParams(temperature=0, max_new_tokens=1))
    with pytest.raises(NonFiniteLogitsError, match=r"weights of sync 2; sequence 1, new token 0"):
        engine.generate([[5, 6], [7, 5, 6]], SAMPLED)


@pytest.mark.parametrize(
    ("contexts", "params", "message"),
    [
        ([[3], []], SAMPLED, "Context 1 of 2 is empty"),
        ([[3] * 181], SAMPLED, "181 tokens and max_new_tokens=12, together 193, but the model has only 192"),
        ([[3, 97]], SAMPLED, "token id 97, but the model has 97"),
        ([[3]], SamplingParams(max_new_tokens=0), "max_new_tokens=0"),
        ([[3]], SamplingParams(temperature=-1.0), r"temperature=-1\.0"),
        ([[3]], SamplingParams(top_p=0.0), r"top_p=0\.0"),
        ([[3]], SamplingParams(top_k=-1), "top_k=-1"),
    ],
)
def test_impossible_requests_are_refused(contexts: list[list[int]], params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(build()).generate(contexts, params)


def test_the_last_position_can_be_used() -> None:
    assert len(engine_of(build()).generate([[3] * 180], SAMPLED)[0].token_ids) == 12


def test_engine_needs_a_model_and_one_seed_each() -> None:
    with pytest.raises(UserError, match="call sync"):
        HFEngine().generate([[3]], SAMPLED)
    with pytest.raises(UserError, match="PEFT model"):
        HFEngine().sync(nn.Linear(2, 2))
    with pytest.raises(UserError, match="max_batch_size=0"):
        HFEngine(max_batch_size=0)
    with pytest.raises(ValueError, match="1 seeds for 2 contexts"):
        engine_of(build()).generate([[3], [4]], SAMPLED, seeds=[1])
    assert engine_of(build()).generate([], SAMPLED) == []
