"""Attention for generation: grouped-query heads without copies of the keys, switched on only while generating."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "lit_agentrl_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, [B, Q, H, D], with the `rep` query heads of a key head folded into the queries.

    [B, H, Q, D] becomes [B, Hkv, rep Q, D], so that keys and values [B, Hkv, K, D] are read where the cache holds them;
    `repeat_kv` would copy all of them for every token. The signature is the one that transformers calls.
    """
    batch, num_heads, num_queries, width = query.shape
    num_kv_heads = key.shape[1]
    repeats = num_heads // num_kv_heads
    # folding repeats the mask [rep Q, K], repeat_kv copies [rep, K, D] twice per key head: better for long prefills
    is_folding_cheaper = num_queries <= 2 * num_kv_heads * width
    is_plain = attention_mask is not None and kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if not (is_plain and is_folding_cheaper):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    assert attention_mask is not None  # implied by `is_plain`
    mask = attention_mask.to(query.dtype)
    if num_queries > 1 and repeats > 1:
        mask = mask.repeat(1, 1, repeats, 1)
    folded = query.reshape(batch, num_kv_heads, repeats * num_queries, width)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)


def text_config(lm: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the language part (of the whole model where there is no other part)."""
    return lm.config.get_text_config(decoder=True)


@contextmanager
def generation_mode(lm: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside, every module's training flag as before afterwards.

    `no_grad` and not `inference_mode`: tensors made inside may be used by training (cached rotary tables, for example).
    """
    training = [module for module in lm.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def grouped_attention_mode(lm: PreTrainedModel) -> Iterator[None]:
    """Use `grouped_attention` inside where it computes what the model's own attention does; restored afterwards.

    "eager" stays: it is how a model says that SDPA cannot express its attention (soft-capping, sinks), and it takes the
    same additive masks. Flash and flex attention are replaced, because they take no 4-D mask.
    """
    config = text_config(lm)
    own = config._attn_implementation
    if own != "eager" and lm._supports_sdpa:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
