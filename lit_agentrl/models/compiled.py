"""Decoder layers compiled in place, for training: names of weights, checkpoints and exports stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch._dynamo.config as dynamo
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm, decoder_of

if TYPE_CHECKING:
    from torch import nn

MAX_GRAPHS = 64
"""Graphs of a layer before PyTorch gives up and runs it uncompiled; 8 by default. A policy needs one each for its first
and its other layers, with and without gradients, adapters, a window, a tree: at most 48, however sizes vary."""


def compile_layers(lm: nn.Module, backend: str = "inductor") -> None:
    """Compile every decoder layer of `lm` for rows and trees of any size; call it before the layers are sharded.

    Layers are alike, so one graph serves them all, and a step compiles in the time of a layer. Forwards with a KV cache
    (generation) run uncompiled: caches grow with every token and would be compiled for again and again.

    Args:
        lm: a transformers causal language model, or a PEFT model around one.
        backend: what compiles the graphs, as torch.compile names it.

    Raises:
        UserError: the architecture has no layers that are known to be its decoder's.
    """
    layers = [module for module in decoder_of(lm).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(base_lm(lm)).__name__} has no layers that could be compiled: set compile to false.")
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
        layer._compiled_call_impl = _unless_cached(layer, layer._compiled_call_impl)


def _unless_cached(layer: nn.Module, compiled: Any) -> Any:
    """What calls `compiled`, or the layer itself where a KV cache is passed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        has_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values", "layer_past"))
        run: Any = layer._call_impl if has_cache else compiled
        return run(*args, **kwargs)

    return call
