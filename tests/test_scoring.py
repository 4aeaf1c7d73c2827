"""Sharing prefixes changes the cost, not the numbers: grouped against padded, padded against the model itself."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers.integrations import flex_attention as hf_flex

from lit_agentrl.errors import UserError
from lit_agentrl.models import (
    PackedTree,
    PaddedModel,
    PrefixGroupedModel,
    TokenScores,
    plan_packs,
    verify_prefix_sharing,
)
from lit_agentrl.models.lm_parts import base_lm, decoder_of
from lit_agentrl.models.tree_attention import TREE_MERGE
from prefix_cases import CONFIGS, PLAIN, SHAPES, SIZES, VOCABULARY, WINDOW, build_lm

EAGER = ("gemma2", "gpt_oss")
"""Models that only eager attention is right for; it computes its softmax in float32, whatever the model's dtype."""


def grouped(lm: nn.Module, backend: str = "auto") -> PrefixGroupedModel:
    """Always through the tree, and without the start-up check, which has tests of its own."""
    model = PrefixGroupedModel(lm, backend=backend, min_reuse=0, check=False)  # type: ignore[arg-type]
    assert not model.refusal
    return model


def padded(lm: nn.Module) -> PaddedModel:
    return PaddedModel(lm, check=False)


def loss_of(scores: TokenScores, targets: Tensor, num_targets: int) -> Tensor:
    """A clipped surrogate with an advantage per row, and an entropy bonus per token: every token's gradient differs."""
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(len(targets), 1, generator=generator, dtype=scores.logprobs.dtype)
    bonus = torch.randn(targets.shape, generator=generator, dtype=scores.logprobs.dtype)
    ratio = (scores.logprobs - scores.logprobs.detach()).exp()
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    if scores.entropy is not None:
        per_token = per_token + bonus * scores.entropy
    return (per_token * targets).sum() / num_targets


def scores_and_gradients(
    model: PaddedModel, shape: str, *, entropy: bool = True, temperature: float = 0.8
) -> tuple[TokenScores, dict[str, Tensor]]:
    token_ids, lengths, targets = SHAPES[shape]()
    model.zero_grad(set_to_none=True)
    scores = model(token_ids, lengths, targets=targets, temperature=temperature, entropy=entropy)
    loss_of(scores, targets, int(targets.sum())).backward()
    return scores, {name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None}


def assert_same(
    one: tuple[TokenScores, dict[str, Tensor]],
    other: tuple[TokenScores, dict[str, Tensor]],
    values: float,
    gradients: float,
) -> None:
    """Values within `values`, gradients of parameters within `gradients`, both absolute."""
    torch.testing.assert_close(one[0].logprobs, other[0].logprobs, rtol=0, atol=values)
    torch.testing.assert_close(one[0].entropy, other[0].entropy, rtol=0, atol=values)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=gradients)
    assert max(float(gradient.abs().max()) for gradient in one[1].values()) > 0.01  # or there is nothing to compare


# --- the padded forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_equals_the_models_own_logits_row_by_row(name: str) -> None:
    """Every row alone through the model's own forward: no padding, no mask, no head of ours."""
    lm = build_lm(CONFIGS[name]())
    token_ids, lengths, _ = SHAPES["ragged"]()
    scores = padded(lm)(token_ids, lengths, temperature=0.7, entropy=True)
    for b, length in enumerate(lengths.tolist()):
        log_p = (lm(input_ids=token_ids[b : b + 1, :length]).logits[0, :-1] / 0.7).log_softmax(-1)
        chosen = log_p.gather(1, token_ids[b, 1:length, None])[:, 0]
        atol = 1e-5 if name in EAGER else 1e-12
        torch.testing.assert_close(scores.logprobs[b, 1:length], chosen, rtol=0, atol=atol)
        torch.testing.assert_close(scores.entropy[b, 1:length], -(log_p.exp() * log_p).sum(-1), rtol=0, atol=atol)
        assert scores.logprobs[b, 0] == 0
        assert not scores.logprobs[b, length:].any()


def test_what_stands_in_the_padding_does_not_matter() -> None:
    lm = build_lm(CONFIGS["llama"]())
    token_ids, lengths, targets = SHAPES["ragged"]()
    wider = torch.full((len(token_ids), token_ids.shape[1] + 5), 77)
    wider[:, : token_ids.shape[1]] = torch.where(token_ids == 0, 33, token_ids)
    wider_targets = nn.functional.pad(targets, (0, 5), value=True)
    for model in (padded(lm), grouped(lm)):
        expected = model(token_ids, lengths, targets=targets).logprobs
        logprobs = model(wider, lengths, targets=wider_targets).logprobs
        assert logprobs.shape == wider.shape
        torch.testing.assert_close(logprobs[:, : token_ids.shape[1]], expected, rtol=0, atol=1e-12)
        assert not logprobs[:, token_ids.shape[1] :].any()


@pytest.mark.parametrize("make", [padded, grouped])
def test_targets_choose_what_is_scored_and_nothing_else(make) -> None:  # type: ignore[no-untyped-def]
    model = make(build_lm(CONFIGS["qwen3"]()))
    token_ids, lengths, targets = SHAPES["multi_turn"]()
    everything = model(token_ids, lengths).logprobs
    scores = model(token_ids, lengths, targets=targets)
    assert scores.entropy is None
    torch.testing.assert_close(scores.logprobs, torch.where(targets, everything, 0.0), rtol=0, atol=1e-12)
    nothing = model(token_ids, lengths, targets=torch.zeros_like(targets))
    assert not nothing.logprobs.any()
    nothing.logprobs.sum().backward()  # a rank without targets still takes part in the backward pass


def test_logprobs_are_float32_for_a_half_precision_model() -> None:
    token_ids, lengths, _ = SHAPES["group"]()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        lm = build_lm(CONFIGS["llama"](), dtype)
        assert padded(lm)(token_ids, lengths).logprobs.dtype == expected
        assert grouped(lm)(token_ids, lengths).logprobs.dtype == expected


# --- grouped equals padded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_equals_padded(name: str, shape: str) -> None:
    """In float64, on every backend that is right for the model. Stock norms compute in float32, hence the gradients."""
    lm = build_lm(CONFIGS[name]())
    expected = scores_and_gradients(padded(lm), shape)
    values = 1e-6 if name in EAGER else 1e-12
    for backend in ("dense", "tree_merge") if name in PLAIN else ("dense",):
        assert_same(scores_and_gradients(grouped(lm, backend), shape), expected, values=values, gradients=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_equals_padded_in_float32(name: str) -> None:
    lm = build_lm(CONFIGS[name](), torch.float32)
    expected = scores_and_gradients(padded(lm), "tree")
    assert_same(scores_and_gradients(grouped(lm), "tree"), expected, values=1e-5, gradients=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_grouped_bfloat16_is_no_further_from_the_truth(name: str) -> None:
    lm = build_lm(CONFIGS[name](), torch.bfloat16)
    token_ids, lengths, targets = SHAPES["multi_turn"]()
    exact = padded(copy.deepcopy(lm).double())(token_ids, lengths, targets=targets).logprobs
    of_padded, of_grouped = (
        (make(lm)(token_ids, lengths, targets=targets).logprobs - exact).abs().sum() for make in (padded, grouped)
    )
    assert of_grouped < 1.25 * of_padded


@pytest.mark.parametrize("shape", ["group", "tree", "multi_turn"])
def test_the_tree_is_needed(shape: str) -> None:
    """The comparison has teeth: the same tokens as one sequence, as a wrong attention would take them, are far off."""
    lm = build_lm(CONFIGS["llama"]())
    token_ids, lengths, _ = SHAPES[shape]()
    tree = PackedTree.build(token_ids, lengths)
    right = grouped(lm).hidden_states(tree, "tree_merge")
    wrong = decoder_of(lm)(input_ids=tree.tokens[None]).last_hidden_state[0]
    assert (right - wrong).abs().max() > 0.1


def test_automatic_backend_knows_what_the_merge_cannot_do() -> None:
    token_ids, lengths, _ = SHAPES["tree"]()
    tree = PackedTree.build(token_ids, lengths)
    chosen = {name: grouped(build_lm(make())).backend_for(tree) for name, make in CONFIGS.items()}
    assert chosen == {name: "tree_merge" if name in PLAIN else "dense" for name in CONFIGS}
    roomy = tf.MistralConfig(**SIZES, sliding_window=tree.depth)
    assert grouped(build_lm(roomy)).backend_for(tree) == "tree_merge"
    with_dropout = tf.LlamaConfig(**SIZES, attention_dropout=0.1)
    assert grouped(build_lm(with_dropout)).backend_for(tree) == "dense"


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_merging_is_refused_where_it_would_be_wrong(name: str) -> None:
    token_ids, lengths, _ = SHAPES["tree"]()
    with pytest.raises(UserError, match="tree_merge"):
        grouped(build_lm(CONFIGS[name]()), "tree_merge")(token_ids, lengths)


def test_packs_add_up_to_the_whole_batch() -> None:
    """Losses divided by counts of the whole batch: gradients of the packs sum to those of the batch."""
    lm = build_lm(CONFIGS["qwen2"]())
    token_ids, lengths, targets = SHAPES["multi_turn"]()
    model = grouped(lm)
    whole = model(token_ids, lengths, targets=targets).logprobs
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (whole * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    packs = plan_packs(token_ids, lengths, budget=25)
    assert len(packs) > 1
    for pack in packs:
        logprobs = model(token_ids[pack], lengths[pack], targets=targets[pack]).logprobs
        torch.testing.assert_close(logprobs, whole[pack], rtol=0, atol=1e-12)
        (logprobs * weights[pack]).sum().backward()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5)  # not divided by the number of targets


# --- what surrounds a training step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("name", "backend"), [("qwen3", "tree_merge"), ("qwen3", "dense"), ("gemma3", "dense")])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_replays_the_tree(name: str, backend: str, use_reentrant: bool) -> None:
    """Layers run again in the backward pass, when the model's own attention is configured again."""
    lm = build_lm(CONFIGS[name]())
    expected = scores_and_gradients(padded(lm), "multi_turn")
    lm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    lm.enable_input_require_grads()
    calls = []
    handle = decoder_of(lm).layers[0].self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = scores_and_gradients(grouped(lm, backend), "multi_turn")
    handle.remove()
    assert len(calls) == 2  # once forward, once replayed
    assert_same(found, expected, values=1e-12, gradients=1e-6)
    assert_same(scores_and_gradients(padded(lm), "multi_turn"), expected, values=1e-12, gradients=1e-6)


def test_others_that_share_the_configuration_keep_their_attention() -> None:
    """A reference built from the same configuration, and an engine that generates between forward and backward."""
    lm = build_lm(CONFIGS["llama"]())
    other = tf.LlamaForCausalLM(lm.config).double().eval()
    token_ids, lengths, _ = SHAPES["group"]()
    expected = other(input_ids=token_ids).logits
    generate = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": VOCABULARY}
    answer = lm.eval().generate(token_ids[:1], **generate)
    scores = grouped(lm)(token_ids, lengths)
    assert lm.config._attn_implementation == "sdpa"
    assert torch.equal(other(input_ids=token_ids).logits, expected)
    assert torch.equal(lm.generate(token_ids[:1], **generate), answer)
    scores.logprobs.sum().backward()
    assert lm.config._attn_implementation == "sdpa"


def lora(lm: nn.Module, **options: object) -> nn.Module:
    """A LoRA model whose adapters do something."""
    model = get_peft_model(lm, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.double()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_its_adapters_alone(checkpointing: bool) -> None:
    lm = lora(build_lm(CONFIGS["llama"]()), target_modules="all-linear")
    if checkpointing:
        lm.enable_input_require_grads()
        base_lm(lm).gradient_checkpointing_enable()
    expected = scores_and_gradients(padded(lm), "tree")
    found = scores_and_gradients(grouped(lm), "tree")
    assert_same(found, expected, values=1e-12, gradients=1e-6)
    assert found[1]
    assert all("lora_" in name for name in found[1])


def test_adapter_off_is_the_reference() -> None:
    plain = build_lm(CONFIGS["llama"]())
    token_ids, lengths, _ = SHAPES["tree"]()
    reference = grouped(plain)(token_ids, lengths).logprobs
    lm = lora(copy.deepcopy(plain), target_modules="all-linear")
    assert (grouped(lm)(token_ids, lengths).logprobs - reference).abs().max() > 0.01
    with torch.no_grad(), lm.disable_adapter():
        torch.testing.assert_close(grouped(lm)(token_ids, lengths).logprobs, reference, rtol=0, atol=1e-12)


def test_adapter_on_the_head_is_heard() -> None:
    """A head that is no plain matrix is called, not read."""
    lm = lora(build_lm(CONFIGS["gemma3"]()), target_modules=["q_proj", "lm_head"])
    token_ids, lengths, _ = SHAPES["tree"]()
    logits = lm(input_ids=token_ids).logits[:, :-1] / 0.8
    expected = logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]
    scores = PaddedModel(lm)(token_ids, lengths, temperature=0.8)
    torch.testing.assert_close(scores.logprobs[:, 1:], expected, rtol=0, atol=1e-12)
    found = scores_and_gradients(grouped(lm), "tree")
    assert_same(found, scores_and_gradients(padded(lm), "tree"), values=1e-12, gradients=1e-6)
    assert any("lm_head" in name for name in found[1])


def test_prompt_learning_is_refused() -> None:
    lm = get_peft_model(build_lm(CONFIGS["llama"]()), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="use LoRA"):
        PaddedModel(lm)


def test_rows_that_share_little_take_the_padded_path(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm(CONFIGS["llama"]())
    ran: list[str] = []
    original = PrefixGroupedModel.hidden_states

    def spy(self: PrefixGroupedModel, tree: PackedTree, backend: str) -> Tensor:
        ran.append(backend)
        return original(self, tree, backend)  # type: ignore[arg-type]

    monkeypatch.setattr(PrefixGroupedModel, "hidden_states", spy)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY, (4, 20), generator=generator)
    lengths = torch.full((4,), 20)
    for prefix, used in ((0, []), (4, []), (6, ["tree_merge"])):  # reuse 1, 1.18 and 1.29
        rows[:, :prefix] = rows[0, :prefix]
        ran.clear()
        logprobs = PrefixGroupedModel(lm, check=False)(rows, lengths).logprobs
        assert ran == used
        torch.testing.assert_close(logprobs, padded(lm)(rows, lengths).logprobs, rtol=0, atol=1e-12)
    ran.clear()
    PrefixGroupedModel(lm, backend="dense", check=False)(rows, lengths)
    assert ran == []


@pytest.mark.parametrize(("name", "backend"), [("llama", "tree_merge"), ("llama", "dense"), ("gpt_oss", "dense")])
def test_mixed_precision_takes_the_same_path(name: str, backend: str) -> None:
    """Under autocast, as Lightning's bf16-mixed: no further from float32 than the padded forward is."""
    lm = build_lm(CONFIGS[name](), torch.float32)
    exact, exact_gradients = scores_and_gradients(padded(lm), "tree")
    distances = []
    for make in (PaddedModel, lambda lm: PrefixGroupedModel(lm, backend=backend, min_reuse=0)):  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            model = make(lm)
            scores, gradients = scores_and_gradients(model, "tree")
        assert not getattr(model, "refusal", "")
        assert scores.logprobs.dtype == torch.float32
        gradient_distance = sum((gradients[k] - exact_gradients[k]).norm() for k in gradients)
        distances.append(((scores.logprobs - exact.logprobs).norm(), gradient_distance))
    assert 0 < distances[1][0] < 1.5 * distances[0][0]
    assert 0 < distances[1][1] < 1.5 * distances[0][1]


# --- FlexAttention on CPU -------------------------------------------------------------------------------------------


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's arithmetic has a backward on CPU; only a guard forbids it. Compiled, torch 2.13 cannot run it."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: object) -> Tensor:
        return flex.flex_attention(query, key, value, **options)  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("shape", ["tree", "multi_turn"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3"])
def test_flex_equals_padded(name: str, shape: str) -> None:
    lm = build_lm(CONFIGS[name]())
    expected = scores_and_gradients(padded(lm), shape)
    found = scores_and_gradients(grouped(lm, "flex"), shape)
    values = 1e-6 if name in EAGER else 1e-12
    assert_same(found, expected, values=values, gradients=1e-6)


# --- start-up checks ------------------------------------------------------------------------------------------------

UNSHAREABLE = {
    "lfm2": lambda: tf.Lfm2Config(**SIZES, full_attn_idxs=[1], block_multiple_of=8),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **SIZES, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    ),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1,
        chunk_size=8,
    ),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "falcon_alibi": lambda: tf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSHAREABLE)
def test_models_where_sharing_is_wrong_fall_back_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    lm = build_lm(UNSHAREABLE[name](), torch.float32).eval()
    token_ids, lengths, _ = SHAPES["ragged"]()
    with caplog.at_level(logging.WARNING, "lit_agentrl"):
        model = PrefixGroupedModel(lm, min_reuse=0)
        logprobs = model(token_ids, lengths).logprobs
        model(token_ids, lengths)
    (warning,) = (record for record in caplog.records if record.name.startswith("lit_agentrl"))
    assert "Shared prefixes are off" in warning.message
    for b, length in enumerate(lengths.tolist()):
        log_p = lm(input_ids=token_ids[b : b + 1, :length]).logits[0, :-1].log_softmax(-1)
        chosen = log_p.gather(1, token_ids[b, 1:length, None])[:, 0]
        torch.testing.assert_close(logprobs[b, 1:length], chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_the_check_finds_hybrids_that_the_static_guard_would_miss(name: str) -> None:
    lm = build_lm(UNSHAREABLE[name](), torch.float32)
    model = PrefixGroupedModel(lm, backend="dense")
    model.refusal = ""
    assert verify_prefix_sharing(model) > 1e-2
    model.run_check()
    assert "start-up check" in model.refusal


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_passes_right_models_and_leaves_no_trace(name: str) -> None:
    lm = build_lm(CONFIGS[name](), torch.float32)
    next(lm.children()).eval()
    modes = [module.training for module in lm.modules()]
    before, generator_state = lm.config.to_dict(), torch.get_rng_state()
    model = PrefixGroupedModel(lm, min_reuse=0)
    assert verify_prefix_sharing(model) < 1e-5
    token_ids, lengths, targets = SHAPES["tree"]()
    model(token_ids, lengths, targets=targets)
    assert model.refusal == ""
    assert [module.training for module in lm.modules()] == modes
    assert lm.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_unknown_scaling_of_logits_is_refused() -> None:
    """A model that does to its logits what no option of its configuration says."""

    class Louder(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    lm = Louder(CONFIGS["llama"]()).double()
    token_ids, lengths, _ = SHAPES["tree"]()
    with pytest.raises(UserError, match="Louder"):
        PaddedModel(lm)(token_ids, lengths)


# --- borders --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    lm = build_lm(CONFIGS["llama"]())
    token_ids, lengths, targets = SHAPES["tree"]()
    with pytest.raises(UserError, match="backend"):
        PrefixGroupedModel(lm, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Image"):
        padded(lm)(token_ids, lengths, vision=object())
    with pytest.raises(UserError, match="transformers"):
        PaddedModel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="targets"):
        padded(lm)(token_ids, lengths, targets=targets.long())
    with pytest.raises(ValueError, match="lengths"):
        padded(lm)(token_ids, lengths[:2])


def test_window_of_the_zoo_is_shorter_than_its_rows() -> None:
    assert all(int(make()[1].max()) > WINDOW for make in SHAPES.values())
    assert TREE_MERGE in tf.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
