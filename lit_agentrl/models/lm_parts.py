"""The parts of a transformers language model that a forward of our own needs: decoder, head, and what attention it has.

This is the one file that reads other people's configurations, where a missing attribute is an answer too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.token_logprobs import Head, scale_logits

PLAIN_LAYERS = {"full_attention", "sliding_attention"}
"""The layer types that a prefix tree is known to be right for: attention over a set of visible tokens."""


def base_lm(lm: nn.Module) -> PreTrainedModel:
    """The transformers model inside `lm`, its LoRA layers in place, without the PEFT wrapper around it.

    Raises:
        UserError: for prompt-learning adapters, which add virtual tokens, and for anything but a transformers model.
    """
    if isinstance(lm, PreTrainedModel):
        return lm
    from peft import PeftModel

    if not isinstance(lm, PeftModel):
        raise UserError(f"{type(lm).__name__}: expected a transformers model, or a PEFT model around one.")
    if lm.active_peft_config.is_prompt_learning:
        raise UserError(
            f"PEFT type {lm.active_peft_config.peft_type}: prompt-learning adapters are not supported; use LoRA."
        )
    return base_lm(lm.get_base_model())


def decoder_of(lm: nn.Module) -> PreTrainedModel:
    """The text decoder of `lm`: token ids to final hidden states."""
    return cast(PreTrainedModel, base_lm(lm).get_decoder())  # type: ignore[no-untyped-call]


def require_causal(lm: nn.Module) -> None:
    """Refuse a model whose text tokens see what comes after them, such as PaliGemma, whose prompts do.

    Raises:
        UserError: for such a model: what it says about a token would depend on the token itself.
    """
    config = decoder_of(lm).config
    in_both_directions = getattr(config, "use_bidirectional_attention", None) in (True, "all")  # not "vision": images
    if in_both_directions or not getattr(config, "is_causal", True):
        raise UserError(
            f"{type(base_lm(lm)).__name__}: its text attends in both directions, so it gives no log-probabilities of "
            "tokens after what comes before them. Use a causal language model."
        )


def head_of(lm: nn.Module) -> Head | None:
    """The head of `lm` with the scaling its model applies, or None where the head is not one plain matrix."""
    linear = base_lm(lm).get_output_embeddings()  # type: ignore[no-untyped-call]
    # Subclasses may be quantised (bitsandbytes) or carry an adapter; FSDP2 makes one that is still a plain matrix.
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point() or linear.weight.ndim != 2:
        return None
    weight, bias = (held.to_local() if isinstance(held, DTensor) else held for held in (linear.weight, linear.bias))
    return Head(weight, bias, *_logit_scaling(lm))  # a DTensor: whole on every rank, beside a split decoder


def logits_of(lm: nn.Module, hidden: Tensor) -> Tensor:
    """[..., V], what the model itself returns for final hidden states [..., D], by calling its head."""
    head: nn.Module = base_lm(lm).get_output_embeddings()  # type: ignore[no-untyped-call]
    return scale_logits(head(hidden), *_logit_scaling(lm))


def _logit_scaling(lm: nn.Module) -> tuple[float, float | None]:
    """The factor on the logits and their soft cap, as transformers 5 names them.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`; Gemma 2
    and its relatives squash by `final_logit_softcapping`, RecurrentGemma by `logits_soft_cap`. `self_check.check_head`
    refuses a model that does otherwise.
    """
    config = base_lm(lm).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return float(scale / (getattr(config, "logits_scaling", None) or 1.0)), float(softcap) if softcap else None


@dataclass(frozen=True)
class AttentionTraits:
    """What decides how a prefix tree may be run through a decoder."""

    implementation: str
    """The attention that the model itself uses: sdpa, eager, flex_attention, ..."""
    windows: dict[str, int | None]
    """The sliding window of each layer type, in tokens of the row; None without one."""
    unshareable: str = ""
    """Why a prefix tree would be wrong for this model; empty when it is right."""
    unmergeable: str = ""
    """Why plain causal attention, merged by log-sum-exp, would be wrong for this model; empty when it is right."""
    supports_sdpa: bool = True
    """Whether scaled_dot_product_attention with a mask computes what the model's own attention does."""
    supports_flex: bool = True
    """Whether transformers runs this model on FlexAttention, which cannot drop attention weights."""

    @property
    def smallest_window(self) -> int | None:
        """The shortest sliding window of any layer."""
        return min((window for window in self.windows.values() if window is not None), default=None)


def attention_traits(decoder: PreTrainedModel) -> AttentionTraits:
    """What `decoder`'s class, configuration and modules say about its attention."""
    config = decoder.config
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) or None
    softcap = getattr(config, "attn_logit_softcapping", None)
    has_sinks = any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in decoder.named_parameters())
    windows = {kind: window if kind == "sliding_attention" else None for kind in layer_types}
    return AttentionTraits(
        implementation=str(config._attn_implementation or "eager"),
        windows=windows
        or {"full_attention": window},  # Mistral's layers are all alike, with the window if there is one
        unshareable=_why_unshareable(decoder, layer_types),
        unmergeable=_why_unmergeable(config, softcap, has_sinks),
        supports_sdpa=bool(decoder._supports_sdpa) and not softcap and not has_sinks,
        supports_flex=bool(decoder._supports_flex_attn) and not getattr(config, "attention_dropout", 0.0),
    )


def _why_unshareable(decoder: PreTrainedModel, layer_types: set[str]) -> str:
    """Why siblings of a tree would see one another, or sit at wrong positions."""
    config = decoder.config
    if other := sorted(layer_types - PLAIN_LAYERS):
        return f"it has {', '.join(other)} layers, whose state would run on from one branch into the next"
    if getattr(config, "layers_block_type", None) or decoder._is_stateful:
        return "it has recurrent layers, whose state would run on from one branch into the next"
    if not decoder._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    if getattr(config, "alibi", False):
        return "its ALiBi biases depend on where tokens are packed"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return "its attention is not causal"
    return ""


def _why_unmergeable(config: Any, softcap: float | None, has_sinks: bool) -> str:
    """Why a softmax over plain scaled scores is not what the model computes."""
    if softcap:
        return "its attention scores are soft-capped"
    if has_sinks:
        return "its attention has sinks"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops attention weights at random"
    query_size = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    if query_size and query_size != getattr(config, "v_head_dim", query_size):
        return "its query and value heads differ in size"
    return ""
