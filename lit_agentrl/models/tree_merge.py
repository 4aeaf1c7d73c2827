"""Exact attention over a packed prefix tree by ordinary flash calls on CPU, merged by their log-sum-exps.

The tree is cut into blocks: a node on itself, causal, and everything below the node on the node, unmasked. Below is
contiguous in depth-first order, so nothing is gathered and no key is copied. The parts are merged by their
log-sum-exps, and the backward calls each block's flash backward with the global ones: the arithmetic of ring attention
(Liu et al., 2023). It does the least work possible, but only for a plain softmax.

Forward and backward are operators of their own, which torch.compile takes as they are: traced, the loop over the nodes
would be compiled anew for every tree.

Legend: T packed tokens, H query heads, K key/value heads, N = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_agentrl.models.prefix_tree import PackedTree

TREE_MERGE = "prefix_tree_merge"
"""The name that `tree_merge` is registered under in transformers."""


def tree_merge(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    prefix_tree: PackedTree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D].

    Raises:
        NotImplementedError: for anything but a plain causal softmax over one packed tree.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if dropout:
        unsupported.append("dropout")
    if prefix_tree is None:
        unsupported.append("a forward without its tree")
    if query.shape[-1] != value.shape[-1]:
        unsupported.append("query and value heads of different sizes")
    if unsupported or prefix_tree is None:
        raise NotImplementedError(f"The attention {TREE_MERGE!r} does not do {', '.join(unsupported)}.")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as sdpa does: rotary embeddings have made float32 of queries and keys
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    positions = None if sliding_window is None else prefix_tree.positions
    out, _ = torch.ops.lit_agentrl.tree_merge(query, key, value, prefix_tree.nodes, scaling, sliding_window, positions)
    return out, None


def _blocks(nodes: Tensor) -> Iterator[tuple[slice, slice, bool, bool]]:
    """(queries, keys, causal, first): the blocks of the tree; `first` where no earlier block has these queries."""
    root_end = 0
    for start, stop, end in nodes.tolist():
        is_root = start >= root_end
        root_end = max(root_end, end)
        yield slice(start, stop), slice(start, stop), True, is_root
        if end > stop:
            yield slice(stop, end), slice(start, stop), False, is_root


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [K, N, T, D] of all three: key heads become the batch, and keys are read N times instead of copied."""
    num_key_heads = key.shape[1]
    grouped = query[0].view(num_key_heads, -1, *query.shape[2:])  # splitting the first dimension never copies
    return (
        grouped,
        key[0, :, None].expand(*grouped.shape[:2], -1, -1),
        value[0, :, None].expand(*grouped.shape[:2], -1, -1),
    )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that parts are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "lit_agentrl::tree_merge",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor nodes, float? scale, int? window, Tensor? positions)"
    " -> (Tensor, Tensor)",
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    nodes: Tensor,
    scale: float | None,
    window: int | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [1, T, H, D] and the log-sum-exps [K, N, T]; it saves nothing else: O(T) memory."""
    if window is not None and positions is not None and window <= (deepest := int(positions.max())):
        raise NotImplementedError(
            f"The attention {TREE_MERGE!r} does not do a sliding window of {window} on rows of {deepest + 1} tokens."
        )
    q, k, v = _by_key_head(query, key, value)
    dtype = _accumulator(q.dtype)
    merged = q.new_empty(q.shape[2], *q.shape[:2], q.shape[3], dtype=dtype).permute(1, 2, 0, 3)  # [K, N, T, D]
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    for queries, keys, causal, first in _blocks(nodes):
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
        )
        if first:
            merged[:, :, queries], lse[:, :, queries] = part, part_lse
            continue
        so_far = lse[:, :, queries]
        total = torch.logaddexp(so_far, part_lse)
        merged[:, :, queries].mul_((so_far - total).exp_()[..., None]).add_(part * (part_lse - total).exp_()[..., None])
        lse[:, :, queries] = total
    return merged.permute(2, 0, 1, 3).flatten(1, 2)[None].to(query.dtype), lse


@_forward.register_fake
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, nodes: Tensor, scale: object, window: object, positions: object
) -> tuple[Tensor, Tensor]:
    _, heads, size, width = query.shape
    lse = query.new_empty(key.shape[1], heads // key.shape[1], size, dtype=_accumulator(query.dtype))
    return query.new_empty(1, size, heads, width), lse


@torch.library.custom_op(
    "lit_agentrl::tree_merge_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor nodes, float? scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    nodes: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    q, k, v = _by_key_head(query, key, value)
    out, grad = (x[0].transpose(0, 1).view(q.shape) for x in (out, grad))
    grad_q = q.new_zeros(q.shape[2], *q.shape[:2], q.shape[3], dtype=lse.dtype).permute(1, 2, 0, 3)
    grad_k, grad_v = (x.new_zeros(x[:, 0].shape, dtype=lse.dtype) for x in (k, v))  # [K, T, D]
    for queries, keys, causal, _ in _blocks(nodes):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
            out[:, :, queries], lse[:, :, queries], 0.0, causal, scale=scale,
        )  # fmt: skip
        grad_q[:, :, queries] += dq
        grad_k[:, keys] += dk.sum(1, dtype=lse.dtype)
        grad_v[:, keys] += dv.sum(1, dtype=lse.dtype)
    return grad_q.flatten(0, 1)[None].to(query.dtype), grad_k[None].to(key.dtype), grad_v[None].to(value.dtype)


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, nodes: Tensor, scale: object
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, size, width = query.shape
    return (
        query.new_empty(1, size, heads, width).transpose(1, 2),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, nodes, ctx.scale, _, _ = inputs
    ctx.save_for_backward(query, key, value, *output, nodes)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, nodes = ctx.saved_tensors
    grads = torch.ops.lit_agentrl.tree_merge_backward(grad, query, key, value, out, lse, nodes, ctx.scale)
    return *grads, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
ALL_ATTENTION_FUNCTIONS.register(TREE_MERGE, tree_merge)
