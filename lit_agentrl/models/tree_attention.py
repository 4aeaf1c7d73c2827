"""Attention over a packed prefix tree: what to run a decoder with, and masks for the model's own attention.

A token sees its ancestors and itself: key k is visible to query q exactly when `k <= q < end[k]`, and inside a sliding
window when their positions in the row also differ by less than the window. Three ways to compute that, all exact:

- `dense_mask`: a [1, 1, T, T] mask for the model's own sdpa or eager attention; supports all that the model does.
- `block_mask`: the same rule as a FlexAttention BlockMask (CUDA; on CPU FlexAttention has no backward).
- `tree_merge` (in its own file): flash calls on blocks of the tree, merged; CPU, for a plain softmax only.

Legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_agentrl.models.compiled import MAX_GRAPHS
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.models.tree_merge import TREE_MERGE

__all__ = [
    "TREE_FLEX",
    "TREE_MERGE",
    "attention_implementation",
    "block_mask",
    "dense_mask",
    "padded_to",
    "refusing_mask",
    "visible",
]

TREE_FLEX = "prefix_tree_flex"
"""The name that `tree_flex` is registered under in transformers."""

BLOCK = 128  # tokens of a side of a mask's blocks: FlexAttention's own default


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
    """The FlexAttention mask of a tree; pad the tree to a multiple of the block size first (`padded_to`).

    Which blocks [128 queries, 128 keys] hold nothing visible, or nothing hidden, follows from the least and the largest
    `end` and position of each: `create_block_mask` would look at all T^2 pairs, or be compiled for every size.

    Raises:
        ValueError: for a tree that was not padded.
    """
    if len(tree) % BLOCK:
        raise ValueError(f"{len(tree)} tokens are no multiple of {BLOCK}: pad the tree first, with padded_to.")
    end, positions = tree.end, tree.positions

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end[key])
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    first = torch.arange(0, len(tree), BLOCK, device=end.device)
    query, key = first[:, None], first[None]
    ends = end.view(-1, BLOCK)
    some = (key <= query) & (query < ends.amax(1))
    every = (key < query) & (query + BLOCK <= ends.amin(1))
    if window is not None:  # bounds: a block between them is looked at token by token
        places = positions.view(-1, BLOCK)
        some &= places.amin(1)[:, None] - places.amax(1)[None] < window
        every &= places.amax(1)[:, None] - places.amin(1)[None] < window
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~every),
        *_in_order(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(len(tree), len(tree)),
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of [n, n] has, [1, 1, n], and which ones, in front of the others: [1, 1, n, n]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def tree_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention as transformers calls it, under autocast in autocast's dtype.

    sdpa is cast by autocast. FlexAttention is not before torch 2.13, where rotary embeddings have made float32 of
    queries and keys, and the values are in 16 bits. It is compiled, once each for the first and for any size, with and
    without gradients, a window, 16 bits: past dynamo's limit of 8 it would compute all T^2 scores.
    """
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(TREE_FLEX, tree_flex)


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
        nodes=torch.cat([tree.nodes, torch.stack([place, place + 1, place + 1], 1).to(tree.nodes.device)]),
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
