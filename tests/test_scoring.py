"""Sharing prefixes changes the cost, not the numbers: grouped against padded, padded against the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

from lit_agentrl.errors import UserError
from lit_agentrl.models import PackedTree, PaddedModel, PrefixGroupedModel
from lit_agentrl.models.lm_parts import decoder_of
from prefix_cases import CONFIGS, PLAIN, SHAPES, SIZES, VOCABULARY, build_lm
from scoring_twins import assert_same, grouped, lora, padded, scores_and_gradients

EAGER = ("gemma2", "gpt_oss")
"""Models that only eager attention is right for; it computes its softmax in float32, whatever the model's dtype."""

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


# --- what surrounds a training step ---------------------------------------------------------------------------------


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

    def spy(self: PrefixGroupedModel, tree: PackedTree, backend: str, *more: object) -> Tensor:
        ran.append(backend)
        return original(self, tree, backend, *more)  # type: ignore[arg-type]

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


# --- borders --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    lm = build_lm(CONFIGS["llama"]())
    token_ids, lengths, targets = SHAPES["tree"]()
    with pytest.raises(UserError, match="backend"):
        PrefixGroupedModel(lm, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="transformers"):
        PaddedModel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="targets"):
        padded(lm)(token_ids, lengths, targets=targets.long())
    with pytest.raises(ValueError, match="lengths"):
        padded(lm)(token_ids, lengths[:2])
