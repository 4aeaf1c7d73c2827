"""Grouped equals padded for every family of models, on every attention that is right for it, and in every precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers.integrations import flex_attention as hf_flex

from lit_agentrl.models import plan_packs
from lit_agentrl.models.lm_parts import decoder_of
from prefix_cases import CONFIGS, PLAIN, SHAPES, SIZES, VOCABULARY, WINDOW, Batch, build_lm
from scoring_twins import Scored, assert_same, grouped, lora, padded, scores_and_gradients

ATTENTION = {"tree_merge": "sdpa", "sdpa": "sdpa", "eager": "eager", "flex": "eager"}
"""What the model itself attends with, and so its padded forward, for each way to run a tree."""

NOT_FLEX = ("gpt_oss", "gpt2")  # sinks need FlexAttention's CUDA kernels; GPT-2 asks the mask for its dimensions
NOT_SDPA = ("gemma2", "gpt_oss")  # soft-capped scores, sinks

REFUSED = {"tree_merge": set(CONFIGS) - set(PLAIN), "sdpa": NOT_SDPA, "eager": (), "flex": NOT_FLEX}
CASES = [(name, attention) for name in CONFIGS for attention in ATTENTION if name not in REFUSED[attention]]
every_family = pytest.mark.parametrize(("name", "attention"), CASES)
every_attention = pytest.mark.parametrize("attention", ATTENTION)

flex_for_training = flex.flex_attention
softmax_as_told = nn.functional.softmax


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on CPU, and float64 throughout for float64 models.

    FlexAttention's arithmetic has a backward on CPU; only a guard forbids it. Compiled, torch 2.13 cannot run it. And
    eager attention, as routers of experts, would round their softmax to float32 whatever the model's dtype.
    """
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: object) -> Tensor:
        return flex_for_training(query, key, value, **options)  # type: ignore[arg-type,return-value]

    def softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        return softmax_as_told(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(nn.functional, "softmax", softmax)


@cache
def model_of(name: str, own_attention: str, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    """Made once for the whole file: no test changes it."""
    return build_lm(CONFIGS[name](), dtype, own_attention)


@cache
def expected_of(name: str, own_attention: str, shape: str, dtype: torch.dtype = torch.float64) -> Scored:
    return scores_and_gradients(padded(model_of(name, own_attention, dtype)), shape)


def backend_of(attention: str) -> str:
    return attention if attention in ("tree_merge", "flex") else "dense"


@pytest.mark.parametrize("shape", SHAPES)
@every_family
def test_grouped_equals_padded_in_float64(name: str, attention: str, shape: str) -> None:
    """Log-probabilities, entropies and gradients; most models' own norms compute in float32, hence the gradients."""
    own = ATTENTION[attention]
    found = scores_and_gradients(grouped(model_of(name, own), backend_of(attention)), shape)
    assert_same(found, expected_of(name, own, shape), values=1e-12, gradients=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@every_family
def test_grouped_equals_padded_in_float32(name: str, attention: str, shape: str) -> None:
    """Gradients to within rounding of the largest one."""
    own, dtype = ATTENTION[attention], torch.float32
    expected = expected_of(name, own, shape, dtype)
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    found = scores_and_gradients(grouped(model_of(name, own, dtype), backend_of(attention)), shape)
    assert_same(found, expected, values=1e-5, gradients=1e-5 * max(1.0, largest))


def renamed_rows() -> Iterator[Batch]:
    """Every shape four times, with other tokens under the same pattern: enough for a mean to mean something."""
    for make in SHAPES.values():
        token_ids, lengths, targets = make()
        for seed in range(4):
            names = 1 + torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(seed))
            yield torch.cat([torch.zeros(1, dtype=torch.long), names])[token_ids], lengths, targets


@torch.no_grad()
def logprobs_of(name: str, own_attention: str, make: Callable[[nn.Module], nn.Module]) -> Tensor:
    lm = model_of(name, own_attention, torch.bfloat16)
    return torch.cat([make(lm)(ids, lengths, targets=t).logprobs[t] for ids, lengths, t in renamed_rows()])


@cache
def exact_and_padded(name: str, own_attention: str) -> tuple[Tensor, float]:
    """[N] float64 log-probabilities of the bfloat16 weights, and the padded bfloat16 forward's mean distance."""
    exact = logprobs_of(name, own_attention, lambda lm: padded(copy.deepcopy(lm).double()))
    return exact, float((logprobs_of(name, own_attention, padded) - exact).abs().mean())


@every_family
def test_grouped_bfloat16_is_no_further_from_the_truth(name: str, attention: str) -> None:
    exact, of_padded = exact_and_padded(name, ATTENTION[attention])
    found = logprobs_of(name, ATTENTION[attention], lambda lm: grouped(lm, backend_of(attention)))
    assert of_padded > 1e-4
    assert (found - exact).abs().mean() < 1.15 * of_padded + 1e-5


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_that_hide_nothing_are_merged(name: str) -> None:
    """As long as the longest row: no mask is needed, and the log-sum-exp merge is right again."""
    config = CONFIGS[name]()
    config.sliding_window = int(SHAPES["multi_turn"]()[1].max())
    lm = build_lm(config)
    expected = scores_and_gradients(padded(lm), "multi_turn")
    assert_same(scores_and_gradients(grouped(lm, "tree_merge"), "multi_turn"), expected, values=1e-12, gradients=1e-6)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in PLAIN])
def test_a_window_is_felt_by_every_shape(name: str) -> None:
    """Or the zoo would not show a mask that forgets the window."""
    without = CONFIGS[name]()
    without.sliding_window = 1000
    assert all(int(make()[1].max()) > WINDOW for make in SHAPES.values())
    with_window, without_window = padded(build_lm(CONFIGS[name]())), padded(build_lm(without))
    for make in SHAPES.values():
        token_ids, lengths, _ = make()
        difference = with_window(token_ids, lengths).logprobs - without_window(token_ids, lengths).logprobs
        assert difference.abs().max() > 1e-2


# --- what surrounds a training step, once per attention -------------------------------------------------------------

FAMILY = {"tree_merge": "qwen3", "sdpa": "gemma3", "eager": "gemma2", "flex": "gemma3"}
"""Windows wherever there are masks."""


@every_attention
def test_old_and_reference_logprobs_come_from_the_same_forward(attention: str) -> None:
    """Without gradients, at any temperature, with entropies, and with the adapter off as if there were none."""
    own, name = ATTENTION[attention], FAMILY[attention]
    token_ids, lengths, targets = SHAPES["multi_turn"]()
    plain = model_of(name, own)
    lm = lora(copy.deepcopy(plain), target_modules=["q_proj", "v_proj", "up_proj"])
    model = grouped(lm, backend_of(attention))

    def score(scorer: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
        scores = scorer(token_ids, lengths, targets=targets, temperature=temperature, entropy=True)
        return scores.logprobs, scores.entropy

    for temperature in (0.6, 1.7):
        with torch.no_grad():
            old = score(model, temperature)
            with lm.disable_adapter():
                reference = score(model, temperature)
        assert not old[0].requires_grad
        torch.testing.assert_close(old, score(model, temperature), rtol=0, atol=1e-12)  # a first ratio of exactly 1
        torch.testing.assert_close(old, score(padded(lm), temperature), rtol=0, atol=1e-12)
        torch.testing.assert_close(reference, score(padded(plain), temperature), rtol=0, atol=1e-12)
        assert (old[0] - reference[0]).abs().max() > 0.01


@every_attention
def test_packs_add_up_to_the_whole_batch(attention: str) -> None:
    """Losses divided by counts of the whole batch: gradients of the packs sum to those of the batch."""
    lm = model_of(FAMILY[attention], ATTENTION[attention])
    token_ids, lengths, targets = SHAPES["multi_turn"]()
    model = grouped(lm, backend_of(attention))
    whole = padded(lm)(token_ids, lengths, targets=targets).logprobs
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / targets.sum()
    lm.zero_grad()
    (whole * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    packs = plan_packs(token_ids, lengths, budget=25)
    assert len(packs) > 1
    lm.zero_grad()
    for pack in packs:
        logprobs = model(token_ids[pack], lengths[pack], targets=targets[pack]).logprobs
        torch.testing.assert_close(logprobs, whole[pack], rtol=0, atol=1e-12)
        (logprobs * weights[pack]).sum().backward()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_attention
def test_gradient_checkpointing_replays_the_tree(attention: str, use_reentrant: bool, with_lora: bool) -> None:
    """Layers run again in the backward pass, when the model's own attention is configured again."""
    lm: nn.Module = copy.deepcopy(model_of(FAMILY[attention], ATTENTION[attention]))
    if with_lora:
        lm = lora(lm, target_modules="all-linear")
    expected = scores_and_gradients(padded(lm), "multi_turn")
    lm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    lm.enable_input_require_grads()
    calls: list[bool] = []
    handle = decoder_of(lm).layers[0].self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = scores_and_gradients(grouped(lm, backend_of(attention)), "multi_turn")
    handle.remove()
    assert len(calls) == 2  # once forward, once replayed
    assert_same(found, expected, values=1e-12, gradients=1e-6)
    assert_same(scores_and_gradients(padded(lm), "multi_turn"), expected, values=1e-12, gradients=1e-6)
    assert all("lora_" in name for name in found[1]) == with_lora


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_lora_trains_what_it_may(name: str, bias: str) -> None:
    lm = lora(build_lm(CONFIGS[name]()), target_modules="all-linear", bias=bias)
    expected = scores_and_gradients(padded(lm), "tree")
    found = scores_and_gradients(grouped(lm), "tree")
    assert_same(found, expected, values=1e-12, gradients=1e-6)
    assert {n for n, p in lm.named_parameters() if p.requires_grad} == set(found[1])


def test_key_heads_shared_by_one_query_head_or_by_all() -> None:
    """Multi-head and multi-query attention: the zoo has two query heads to a key head."""
    for key_heads in (4, 1):
        lm = build_lm(tf.LlamaConfig(**(SIZES | {"num_key_value_heads": key_heads})))
        expected = scores_and_gradients(padded(lm), "tree")
        for backend in ("tree_merge", "dense", "flex"):
            assert_same(scores_and_gradients(grouped(lm, backend), "tree"), expected, values=1e-12, gradients=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_flex_attention_gets_one_dtype_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings make float32 of queries and keys: the kernels get the values' 16 bits for all three."""
    seen = set()

    def spy(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: object) -> Tensor:
        seen.update((query.dtype, key.dtype, value.dtype))
        return flex_for_training(query, key, value, **options)  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", spy)
    lm = build_lm(CONFIGS[name](), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = scores_and_gradients(grouped(lm, "flex"), "tree")
    assert seen == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = scores_and_gradients(padded(lm), "tree")
    assert float((found.logprobs - expected.logprobs).abs().max()) < 0.05
