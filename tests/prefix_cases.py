"""Batches that share prefixes in every way, and a zoo of tiny language models to run them through."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 97
WINDOW = 9  # tokens; shorter than every row below, so that sliding windows matter

Batch = tuple[Tensor, Tensor, Tensor]  # token ids [B, L], lengths [B], targets [B, L]


def _pad(rows: list[list[int]], target_rows: list[list[bool]]) -> Batch:
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    targets = torch.zeros(token_ids.shape, dtype=torch.bool)
    for b, (row, wanted) in enumerate(zip(rows, target_rows, strict=True)):
        token_ids[b, : len(row)] = torch.tensor(row)
        targets[b, : len(row)] = torch.tensor(wanted)
    return token_ids, lengths, targets


def _sampler(seed: int) -> Callable[[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def group(ragged: bool = False) -> Batch:
    """One prompt, five completions."""
    sample = _sampler(1)
    prompt = sample(14)
    completions = [sample(3 + 2 * i if ragged else 7) for i in range(5)]
    return _pad([prompt + c for c in completions], [[False] * 14 + [True] * len(c) for c in completions])


def tree() -> Batch:
    """A prompt, then three branchings: eight leaves, whose shared segments are targets of several rows."""
    sample = _sampler(2)
    rows = [sample(6)]
    for _ in range(3):
        rows = [row + sample(4) for row in rows for _ in range(2)]
    return _pad(rows, [[False] * 6 + [True] * 12 for _ in rows])


def multi_turn() -> Batch:
    """Two episodes of three turns; every turn is a row, its context the whole history."""
    sample = _sampler(3)
    prompt = sample(8)
    rows, wanted = [], []
    for _ in range(2):
        history = prompt
        for _ in range(3):
            action = sample(3)
            rows.append(history + action)
            wanted.append([False] * len(history) + [True] * 3)
            history = history + action + sample(4)
    return _pad(rows, wanted)


def nested() -> Batch:
    """Two unrelated roots; each row a prefix of the next, all real tokens targets."""
    sample = _sampler(4)
    rows = [row[:length] for row in (sample(20), sample(13)) for length in (1, 5, 12, len(row))]
    return _pad(rows, [[True] * len(row) for row in rows])


def duplicates() -> Batch:
    """The same row three times, with different targets, beside another."""
    sample = _sampler(5)
    row, other = sample(16), sample(11)
    half = [t >= 8 for t in range(16)]
    return _pad([row, other, row, row], [[True] * 16, [True] * 11, half, [not x for x in half]])


def pairs(num_prompts: int = 3, alike: int = 0) -> Batch:
    """Prompts with a chosen and a rejected answer each, in turn; answers of a pair begin with `alike` equal tokens."""
    sample = _sampler(6)
    rows, wanted = [], []
    for i in range(num_prompts):
        prompt, beginning = sample(10), sample(alike)
        for length in (5 + i, 5 + 3 * i):
            rows.append(prompt + beginning + sample(length - alike))
            wanted.append([False] * 10 + [True] * length)
    return _pad(rows, wanted)


SHAPES: dict[str, Callable[[], Batch]] = {
    "group": group,
    "ragged": lambda: group(ragged=True),
    "tree": tree,
    "multi_turn": multi_turn,
    "nested": nested,
    "duplicates": duplicates,
}

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": _MIXED}
_EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}  # grouped matmuls have no float64

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_SIZES),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma2": lambda: tf.Gemma2Config(
        **_SIZES, **_GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0, attn_implementation="eager"
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SIZES, **_GEMMA),
    "granite": lambda: tf.GraniteConfig(
        **_SIZES, logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "cohere": lambda: tf.CohereConfig(**_SIZES, logit_scale=0.25),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_SIZES, **_EXPERTS, num_local_experts=4, head_dim=8, sliding_window=WINDOW, layer_types=_MIXED
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=4, head_dim=8, moe_intermediate_size=24),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    ),
}
PLAIN = ("llama", "qwen2", "qwen3", "granite", "cohere", "qwen3_moe", "gpt2")
"""Models whose attention is a plain causal softmax."""
SIZES = _SIZES


def build_lm(
    config: tf.PreTrainedConfig, dtype: torch.dtype = torch.float64, attention: str | None = None
) -> tf.PreTrainedModel:
    """A model with weights far from zero, norms, biases and sinks too, so that mistakes show; `attention` as given."""
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return lm.train()
