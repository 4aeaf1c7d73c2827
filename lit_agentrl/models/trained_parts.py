"""Weights that were trained whole beside an adapter (a connector, say): a file of their own in the adapter's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lit_agentrl.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

FILE = "trained_parts.safetensors"


def trained_parts(lm: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights of the model inside an adapter, by the names they have without one."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in lm.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


@torch.no_grad()
def load_trained_parts(lm: nn.Module, adapter: Path) -> None:
    """Put the weights of an adapter's folder, where it has such, into the model under the adapter.

    Raises:
        UserError: The file is damaged, or belongs to another model.
    """
    file = adapter / FILE
    if not file.is_file():
        return
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    own = {name.replace(".base_layer.", "."): parameter for name, parameter in lm.named_parameters()}
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{file} does not belong to the adapter's base model: {name} {list(value.shape)}.")
        own[name].copy_(value)
