"""Tiny models of many families, synced engines in this process, and what transformers itself gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
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

from lit_agentrl.rollouts import ContinuousBatchingEngine
from lit_agentrl.rollouts.hf import HFEngine
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


def paged(lm: nn.Module, **options: object) -> ContinuousBatchingEngine:
    """A synced engine with small pages and forwards, so that contexts are split and pages shared."""
    small = {"stop_token_ids": [], "max_cached_tokens": 1024, "page_size": 16, "max_batch_tokens": 64}
    engine = ContinuousBatchingEngine(**(small | options))
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
