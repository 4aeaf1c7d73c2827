"""What a language model allows and expects of a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lit_agentrl.rollouts.grouped_attention import text_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def vocab_size(lm: PreTrainedModel) -> int:
    """Tokens the model can embed."""
    return len(cast("Tensor", lm.get_input_embeddings().weight))


def max_length(lm: PreTrainedModel) -> int | None:
    """Positions the model has; None where its configuration does not limit them."""
    length: int | None = getattr(text_config(lm), "max_position_embeddings", None)
    return length


def default_stop_ids(lm: PreTrainedModel) -> list[int]:
    """The end tokens of the model's generation configuration, or else of its configuration."""
    generation = lm.generation_config
    ids = None if generation is None else generation.eos_token_id
    if ids is None:
        ids = text_config(lm).eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
