"""Models that a prefix tree would be wrong for: found before the first use, said once, and computed in full."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf

from lit_agentrl.models import PrefixGroupedModel, verify_prefix_sharing
from prefix_cases import SHAPES, SIZES, VOCABULARY, build_lm
from scoring_twins import padded, scores_and_gradients

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}

RECURRENT = {
    "lfm2": lambda: tf.Lfm2Config(**SIZES, full_attn_idxs=[1], block_multiple_of=8),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **SIZES, **_DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(**SIZES, **_DELTA),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1,
        chunk_size=8,
    ),
    "bamba": lambda: tf.BambaConfig(**SIZES, **_MAMBA, attn_layer_indices=[1]),
    "jamba": lambda: tf.JambaConfig(
        **SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4
    ),
    "falcon_h1": lambda: tf.FalconH1Config(**SIZES, **_MAMBA, mamba_d_ssm=64),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, lru_width=32, attention_window_size=64, pad_token_id=0,
    ),
}  # fmt: skip
ALIBI = {
    "bloom": lambda: tf.BloomConfig(**_BLOOM, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "falcon_alibi": lambda: tf.FalconConfig(**_BLOOM, num_hidden_layers=2, num_attention_heads=4, alibi=True),
}
CLASSIC = {
    "gptj": lambda: tf.GPTJConfig(**_GPT),
    "codegen": lambda: tf.CodeGenConfig(**_GPT, n_ctx=128),
    "stablelm": lambda: tf.StableLmConfig(**SIZES),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128,
        attention_types=[[["global"], 2]], bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
"""Models that had no attention interface; transformers brings it to one after the other (5.24: GPT-J and CodeGen)."""
NO_INTERFACE = {
    name: make
    for name, make in CLASSIC.items()
    if not tf.MODEL_FOR_CAUSAL_LM_MAPPING[type(make())]._supports_attention_backend
}
UNSHAREABLE = RECURRENT | ALIBI | NO_INTERFACE


@pytest.mark.parametrize("name", UNSHAREABLE)
def test_models_where_sharing_is_wrong_fall_back_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers are the model's own, row by row, and gradients the padded forward's."""
    lm = build_lm(UNSHAREABLE[name](), torch.float32).eval()
    token_ids, lengths, _ = SHAPES["ragged"]()
    with caplog.at_level(logging.DEBUG, "lit_agentrl"):
        model = PrefixGroupedModel(lm, min_reuse=0)
        logprobs = model(token_ids, lengths).logprobs
        gradients = scores_and_gradients(model, "tree")[1]
    (said,) = (record for record in caplog.records if record.name.startswith("lit_agentrl"))
    assert said.levelno == logging.WARNING
    assert said.message == f"Shared prefixes are off for {type(lm).__name__}: {model.refusal}. " + (
        "Rows are computed in full instead."
    )
    for b, length in enumerate(lengths.tolist()):
        log_p = lm(input_ids=token_ids[b : b + 1, :length]).logits[0, :-1].log_softmax(-1)
        chosen = log_p.gather(1, token_ids[b, 1:length, None])[:, 0]
        torch.testing.assert_close(logprobs[b, 1:length], chosen, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradients, scores_and_gradients(padded(lm), "tree")[1])


@pytest.mark.parametrize("name", UNSHAREABLE)
def test_the_reason_is_known_without_running_the_model(name: str) -> None:
    with torch.device("meta"):
        lm = tf.AutoModelForCausalLM.from_config(UNSHAREABLE[name]())
    refusal = PrefixGroupedModel(lm, check=False).refusal
    if name in RECURRENT:
        assert "layers, whose state would run on from one branch into the next" in refusal
    else:
        assert "ALiBi" in refusal or "attention interface" in refusal


@pytest.mark.parametrize("name", [name for name in CLASSIC if name not in NO_INTERFACE])
def test_models_that_got_the_interface_share_and_are_right(name: str) -> None:
    lm = build_lm(CLASSIC[name](), torch.float64).eval()
    token_ids, lengths, _ = SHAPES["ragged"]()
    model = PrefixGroupedModel(lm, min_reuse=0)
    torch.testing.assert_close(
        model(token_ids, lengths).logprobs, padded(lm)(token_ids, lengths).logprobs, rtol=0, atol=1e-9
    )
    assert not model.refusal
    torch.testing.assert_close(
        scores_and_gradients(model, "tree")[1], scores_and_gradients(padded(lm), "tree")[1], rtol=1e-6, atol=1e-9
    )


def test_some_models_have_no_interface_yet() -> None:
    """Else the refusal below them is dead code, and this list needs others."""
    assert NO_INTERFACE


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "qwen3_5", "bamba", "jamba", "mamba2"])
def test_the_check_finds_hybrids_that_the_static_guard_would_miss(name: str) -> None:
    lm = build_lm(UNSHAREABLE[name](), torch.float32)
    model = PrefixGroupedModel(lm, backend="dense")
    model.refusal = ""
    assert verify_prefix_sharing(model) > 1e-2
    model.run_check()
    assert "start-up check" in model.refusal
