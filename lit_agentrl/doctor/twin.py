"""The same policy in another precision, where there is memory for a copy."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from torch import nn

from lit_agentrl.doctor.memory import available_bytes
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.scoring import PaddedModel

ROOM = 1.5  # of the copy's weights: the pass needs some too
LARGE = 2_000_000_000
"""Weights from which on float64 takes too long; float32 is exact enough beside 16-bit floats."""


def exact_dtype(lm: nn.Module, *, half: bool) -> torch.dtype | None:
    """The precision to measure rounding against; None where none above the model's own is affordable."""
    if sum(p.numel() for p in lm.parameters()) < LARGE:
        return torch.float64
    return torch.float32 if half else None


def twin_of(lm: nn.Module, dtype: torch.dtype) -> PaddedModel | None:
    """A copy of `lm` with its weights in `dtype`, scored by the plain forward; None where memory does not allow it.

    Buffers stay as they are (rotary frequencies are float32 in every precision), and so does an adapter in 16 bits,
    as when a policy is loaded.
    """
    needed = sum(p.numel() for p in lm.parameters()) * dtype.itemsize
    available = available_bytes(base_lm(lm).device)
    if available is not None and needed * ROOM > available:
        return None
    twin = copy.deepcopy(lm)
    for parameter in twin.parameters():
        is_adapter = isinstance(twin, PeftModel) and parameter.requires_grad
        if not (is_adapter and dtype.itemsize < 4):
            parameter.data = parameter.data.to(dtype)
        parameter.grad = None
    return PaddedModel(twin.requires_grad_(False), check=False)


def dtype_of(policy: PaddedModel) -> torch.dtype:
    """Of the model's weights (an adapter's may differ)."""
    return base_lm(policy.lm).dtype
