"""Attention over a packed prefix tree: masks for the model's own attention, and an exact merge of flash calls on CPU.

A token sees its ancestors and itself: key k is visible to query q exactly when `k <= q < end[k]`, and inside a sliding
window when their positions in the row also differ by less than the window. Three ways to compute that, all exact:

- `dense_mask`: a [1, 1, T, T] mask for the model's own sdpa or eager attention; supports all that the model does.
- `block_mask`: the same rule as a FlexAttention BlockMask (CUDA; on CPU FlexAttention has no backward).
- `tree_merge`: the tree cut into blocks, each an ordinary flash call: a node on itself, causal, and everything below
  the node on the node, unmasked. Below is contiguous in depth-first order, so nothing is gathered and no key is copied.
  The parts are merged by their log-sum-exps, and the backward calls each block's flash backward with the global ones:
  the arithmetic of ring attention (Liu et al., 2023). It does the least work possible, but only for a plain softmax.

Legend: T packed tokens, H query heads, K key/value heads, N = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_agentrl.models.prefix_tree import PackedTree

TREE_MERGE = "prefix_tree_merge"
"""The name that `tree_merge` is registered under in transformers."""


def visible(tree: PackedTree, window: int | None = None) -> Tensor:
    """[T, T] bool: whether a query (row) sees a key (column)."""
    place = torch.arange(len(tree), device=tree.end.device)
    mask = (place[None] <= place[:, None]) & (place[:, None] < tree.end[None])
    if window is not None:
        mask &= tree.positions[:, None] - tree.positions[None] < window
    return mask


def dense_mask(tree: PackedTree, window: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """[1, 1, T, T]: bool for sdpa; with a `dtype`, 0 and its minimum to add to scores, as eager attention wants."""
    mask = visible(tree, window)[None, None]
    if dtype is None:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def block_mask(tree: PackedTree, window: int | None = None) -> BlockMask:
    """The FlexAttention mask of a tree; pad the tree to a multiple of the block size first (`padded_to`)."""
    end, positions = tree.end, tree.positions

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end[key])
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    compiled = end.device.type == "cuda"  # uncompiled, the mask is first made dense: T^2 bools
    return create_block_mask(rule, None, None, len(tree), len(tree), device=end.device, _compile=compiled)


def padded_to(tree: PackedTree, multiple: int) -> PackedTree:
    """The tree with unused tokens behind it, so that kernels meet few different sizes.

    Each sees only itself: a row of attention that sees nothing would be NaN.
    """
    missing = -len(tree) % multiple
    if not missing:
        return tree
    place = torch.arange(len(tree), len(tree) + missing, device=tree.end.device)
    zeros = torch.zeros_like(place)
    return PackedTree(
        tokens=torch.cat([tree.tokens, zeros]),
        positions=torch.cat([tree.positions, zeros]),
        parent=torch.cat([tree.parent, zeros - 1]),
        end=torch.cat([tree.end, place + 1]),
        index=tree.index,
        nodes=tree.nodes + tuple((p, p + 1, p + 1) for p in place.tolist()),
        num_row_tokens=tree.num_row_tokens,
    )


def refusing_mask() -> Tensor:
    """[1, 1, 0, 0]: a mask that `tree_merge` ignores and every other attention stumbles over.

    Were the tree's tokens ever run through the model's usual attention, they would be a sequence like any other and the
    numbers silently wrong; this makes it an error of shapes.
    """
    return torch.zeros(1, 1, 0, 0, dtype=torch.bool)


@contextmanager
def attention_implementation(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Run `decoder` with the attention called `name`, here and when gradient checkpointing computes layers again.

    transformers looks the name up in the configuration at every call, and others (an engine that generates with the
    same model, a reference that shares the configuration) must find their own there afterwards. Checkpointed layers run
    a second time in the backward pass, after this context has ended: what they replay takes the switch along.
    """
    with ExitStack() as stack:
        for module in decoder.modules():
            if "_gradient_checkpointing_func" in vars(module):
                checkpoint = vars(module)["_gradient_checkpointing_func"]
                stack.callback(vars(module).__setitem__, "_gradient_checkpointing_func", checkpoint)
                vars(module)["_gradient_checkpointing_func"] = _replaying(checkpoint, decoder, name)
        stack.enter_context(_configured(decoder, name))
        yield


@contextmanager
def _configured(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """The configuration names the attention `name`, for now."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def _replaying(checkpoint: Callable[..., Any], decoder: PreTrainedModel, name: str) -> Callable[..., Any]:
    """`checkpoint`, for functions that need the attention `name` whenever they run."""

    def checkpoint_with_attention(function: Callable[..., Any], *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with _configured(decoder, name):
                return function(*inputs)

        return checkpoint(run, *args)

    return checkpoint_with_attention


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
    elif sliding_window is not None and sliding_window < prefix_tree.depth:
        unsupported.append(f"a sliding window of {sliding_window} on rows of {prefix_tree.depth} tokens")
    if query.shape[-1] != value.shape[-1]:
        unsupported.append("query and value heads of different sizes")
    if unsupported or prefix_tree is None:
        raise NotImplementedError(f"The attention {TREE_MERGE!r} does not do {', '.join(unsupported)}.")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as sdpa does: rotary embeddings have made float32 of queries and keys
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    out: Tensor = _TreeMerge.apply(query, key, value, prefix_tree.nodes, scaling)  # type: ignore[no-untyped-call]
    return out, None


def _blocks(nodes: tuple[tuple[int, int, int], ...]) -> Iterator[tuple[slice, slice, bool, bool]]:
    """(queries, keys, causal, first): the blocks of the tree; `first` where no earlier block has these queries."""
    root_end = 0
    for start, stop, end in nodes:
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


class _TreeMerge(torch.autograd.Function):
    """Exact tree attention that saves only queries, keys, values, output and log-sum-exp: O(T) memory."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        nodes: tuple[tuple[int, int, int], ...],
        scale: float | None,
    ) -> Tensor:
        q, k, v = _by_key_head(query, key, value)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
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
            merged[:, :, queries].mul_((so_far - total).exp_()[..., None]).add_(
                part * (part_lse - total).exp_()[..., None]
            )
            lse[:, :, queries] = total
        out = merged.permute(2, 0, 1, 3).flatten(1, 2)[None].to(query.dtype)  # [1, T, H, D]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.nodes, ctx.scale = nodes, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        q, k, v = _by_key_head(query, key, value)
        out, grad = (x[0].transpose(0, 1).unflatten(0, q.shape[:2]) for x in (out, grad))
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        grad_k, grad_v = (torch.zeros(x[:, 0].shape, dtype=lse.dtype, device=x.device) for x in (k, v))  # [K, T, D]
        for queries, keys, causal, _ in _blocks(ctx.nodes):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
                out[:, :, queries], lse[:, :, queries], 0.0, causal, scale=ctx.scale,
            )  # fmt: skip
            grad_q[:, :, queries] += dq
            grad_k[:, keys] += dk.sum(1, dtype=lse.dtype)
            grad_v[:, keys] += dv.sum(1, dtype=lse.dtype)
        grad_q = grad_q.flatten(0, 1)[None].to(query.dtype)
        return grad_q, grad_k[None].to(key.dtype), grad_v[None].to(value.dtype), None, None


ALL_ATTENTION_FUNCTIONS.register(TREE_MERGE, tree_merge)
