"""Activation checkpointing for a model that stays in `eval()`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_agentrl.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def recompute_activations(lm: PreTrainedModel) -> None:
    """Let every decoder layer of `lm` recompute its activations in backward instead of keeping them.

    transformers checkpoints a layer only where `layer.training` is set, and there it drops the layer's KV cache. A
    policy is in `eval()` and generates from a cache, so the flag of the layer alone (its children keep theirs) is
    raised for each forward that records gradients and reads no cache, and lowered after it.

    Raises:
        UserError: The architecture, or the installed transformers, does not support it.
    """
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not lm.supports_gradient_checkpointing:
        raise UserError(f"{type(lm).__name__} does not support gradient_checkpointing: set it to false.")
    if not hasattr(
        lm, "activation_checkpointing_enable"
    ):  # 5.17, say: there layers look at the flag before their hooks
        raise UserError(
            f"gradient_checkpointing needs a newer transformers than {transformers.__version__}: upgrade it, or set "
            "gradient_checkpointing to false."
        )
    lm.activation_checkpointing_enable()
    for layer in layers:
        layer.register_forward_pre_hook(_raise_flag, with_kwargs=True)
        layer.register_forward_hook(_lower_flag, always_call=True)


def _raise_flag(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name from transformers 5.24 on, and before
    layer.training = torch.is_grad_enabled() and (cache is None or cache.get_seq_length() == 0)


def _lower_flag(layer: nn.Module, args: tuple[Any, ...], output: object) -> None:
    layer.training = False
