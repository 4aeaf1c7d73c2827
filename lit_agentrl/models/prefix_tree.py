"""Rows that share prefixes, packed so that every unique (prefix, token) is stored once.

Sorted lexicographically, rows lie next to the rows they share most with; the longest common prefix (LCP) of neighbours
then gives the prefix tree in depth-first order without a single node object. One array holds its whole shape: `end[k]`,
the depth-first exit of token k. A query q sees a key k exactly when `k <= q < end[k]`. A group with one prompt, a tree
of branches, the growing contexts of a multi-turn episode, duplicates and a preference pair are all the same case.

Legend: B rows, L row length, T unique tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Ints = NDArray[np.int64]


@dataclass
class PackedTree:
    """The unique tokens of a batch of rows, in depth-first order.

    A plain dataclass of tensors without caches: Lightning moves it like any other batch.
    """

    tokens: Tensor
    """[T] int64, the unique tokens."""
    positions: Tensor
    """[T] int64, how many tokens come before each one in its row: its rotary position."""
    parent: Tensor
    """[T] int64, where the previous token of the row is packed; -1 for a row's first token."""
    end: Tensor
    """[T] int64, one past the last token whose row runs through this one: its descendants are [k, end[k])."""
    index: Tensor
    """[B, L] int64, where token t of row b is packed; 0 where the row is padded."""
    nodes: Tensor
    """[N, 3] int64: start, stop and end of every unbranched run of tokens [start, stop), whose subtree ends at `end`;
    depth-first. `to` leaves it on the host, where a loop reads it."""
    num_row_tokens: int
    """Real tokens of all rows: what the padded forward computes, without its padding."""

    @classmethod
    def build(cls, token_ids: Tensor, lengths: Tensor, keys: Tensor | None = None) -> PackedTree:
        """The prefix tree of right-padded rows, in time linear in the row tokens.

        Args:
            token_ids: [B, L], right-padded.
            lengths: [B], real tokens of each row.
            keys: [B, L], what decides whether two tokens are the same; the token ids by default. Image placeholders
                need a key made of the image's content, or prompts with different images would merge.

        Raises:
            ValueError: for shapes that do not fit, lengths outside [0, L], or no token at all.
        """
        ids, row_keys, row_lengths = _rows_on_host(token_ids, lengths, keys)
        order = _depth_first(row_keys, row_lengths)
        num_row_tokens = int(row_lengths.sum())
        num_unique = num_row_tokens - sum(common for _, common in order)
        tokens, positions, parent, end = (np.empty(num_unique, np.int64) for _ in range(4))
        index = np.zeros(ids.shape, np.int64)
        path = np.empty(ids.shape[1], np.int64)  # where the tokens of the previous row are packed
        size = previous_length = 0
        for b, common in order:
            length = int(row_lengths[b])
            start, size = size, size + length - common
            # The previous row leaves the path here: those subtrees are complete.
            end[path[common:previous_length]] = start
            tokens[start:size] = ids[b, common:length]
            positions[start:size] = np.arange(common, length)
            parent[start:size] = np.arange(start - 1, size - 1)
            if size > start:
                parent[start] = path[common - 1] if common else -1
            path[common:length] = np.arange(start, size)
            index[b, :length] = path[:length]
            previous_length = length
        end[path[:previous_length]] = size
        tree = cls(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            parent=torch.from_numpy(parent),
            end=torch.from_numpy(end),
            index=torch.from_numpy(index),
            nodes=torch.from_numpy(_compress(parent, end)),
            num_row_tokens=num_row_tokens,
        )
        return tree.to(token_ids.device)

    @classmethod
    def from_ungrouped_masks(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        group_sizes: list[int],
    ) -> PackedTree:
        """The tree of prompts with several completions each, given the way the Prefix Grouper paper does.

        Args:
            prompt_ids: [G, P], one prompt per group.
            prompt_mask: [G, P], True on real prompt tokens (padding on either side).
            completion_ids: [B, C], all completions, group after group.
            completion_mask: [B, C], True on real completion tokens. Which tokens *exist*, not which have a loss.
            group_sizes: completions of each prompt; they sum to B.

        Raises:
            ValueError: if the sizes do not add up.
        """
        if len(group_sizes) != len(prompt_ids) or sum(group_sizes) != len(completion_ids):
            raise ValueError(
                f"group_sizes={group_sizes} must hold one size per prompt ({len(prompt_ids)}) and sum to the number of "
                f"completions ({len(completion_ids)})."
            )
        group = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes)).tolist()
        rows = [
            torch.cat([prompt_ids[g][prompt_mask[g].bool()], completion_ids[b][completion_mask[b].bool()]])
            for b, g in enumerate(group)
        ]
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return cls.build(token_ids, torch.tensor([len(row) for row in rows]))

    def __len__(self) -> int:
        """T, the unique tokens."""
        return self.tokens.numel()

    @property
    def reuse(self) -> float:
        """Row tokens per unique token: what sharing saves at best; 1 when nothing is shared."""
        return self.num_row_tokens / len(self)

    @property
    def depth(self) -> int:
        """Tokens of the longest row."""
        return int(self.positions.max()) + 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTree:
        """The same tree with its tensors on `device`."""
        return PackedTree(
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            parent=self.parent.to(device, non_blocking=non_blocking),
            end=self.end.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            nodes=self.nodes,
            num_row_tokens=self.num_row_tokens,
        )

    def unique_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The packed tokens that any row has as a target, each once, and which of them every target of the rows is.

        Args:
            targets: [B, L] bool; never at t = 0, which nothing predicts.

        Returns:
            edges: [N] int64 ascending. The log-probability of edge e is that of `tokens[e]` at `parent[e]`.
            inverse: [targets.sum()] int64, so that `value[inverse]` lies in the order of `rows[targets]`.
        """
        packed = self.index[targets]
        is_target = torch.zeros(len(self), dtype=torch.bool, device=packed.device)
        is_target[packed] = True
        return is_target.nonzero()[:, 0], (is_target.cumsum(0) - 1)[packed]


def plan_packs(token_ids: Tensor, lengths: Tensor, budget: int, keys: Tensor | None = None) -> list[list[int]]:
    """Rows split into packs of at most `budget` unique tokens: contiguous runs of the depth-first order.

    Only neighbours on a cut compute their common prefix twice. A row longer than the budget is a pack of its own. The
    sum of the packs' losses is that of the whole batch, as long as the loss is divided by counts of the whole batch.

    Args:
        token_ids: [B, L], right-padded.
        lengths: [B], real tokens of each row.
        budget: unique tokens that a pack may hold.
        keys: [B, L], see `PackedTree.build`.

    Returns:
        Row numbers of each pack; every row is in exactly one.

    Raises:
        ValueError: for a budget below 1, and as `PackedTree.build` does.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: a pack needs room for at least 1 token.")
    _, row_keys, row_lengths = _rows_on_host(token_ids, lengths, keys)
    packs: list[list[int]] = []
    used = 0
    for b, common in _depth_first(row_keys, row_lengths):
        length = int(row_lengths[b])
        if packs and used + length - common <= budget:
            packs[-1].append(b)
            used += length - common
        else:
            packs.append([b])
            used = length
    return packs


def _rows_on_host(token_ids: Tensor, lengths: Tensor, keys: Tensor | None) -> tuple[Ints, Ints, Ints]:
    """Token ids [B, L], keys [B, L] and lengths [B] as numpy arrays, checked."""
    if token_ids.ndim != 2 or lengths.shape != token_ids.shape[:1]:
        raise ValueError(
            f"token_ids {list(token_ids.shape)} and lengths {list(lengths.shape)}: expected [B, L] right-padded rows "
            "and [B] lengths."
        )
    if keys is not None and keys.shape != token_ids.shape:
        raise ValueError(f"keys {list(keys.shape)} must have the shape of token_ids {list(token_ids.shape)}.")
    ids = token_ids.detach().cpu().numpy().astype(np.int64, copy=False)
    row_keys = ids if keys is None else keys.detach().cpu().numpy().astype(np.int64, copy=False)
    row_lengths = lengths.detach().cpu().numpy().astype(np.int64, copy=False)
    if not row_lengths.sum() or row_lengths.min() < 0 or row_lengths.max() > ids.shape[1]:
        raise ValueError(
            f"lengths {row_lengths.tolist()} must lie in [0, {ids.shape[1]}] (the row length) and not all be 0."
        )
    return ids, row_keys, row_lengths


def _depth_first(row_keys: Ints, row_lengths: Ints) -> list[tuple[int, int]]:
    """(row, tokens it shares with the row before) in depth-first order of the prefix tree."""
    # Big-endian bytes compare as sequences of tokens do: any fixed order of tokens makes neighbours share the most.
    sort_keys = [row[:length].astype(">i8").tobytes() for row, length in zip(row_keys, row_lengths, strict=True)]
    order = sorted(range(len(sort_keys)), key=sort_keys.__getitem__)
    shared, previous = [], row_keys[0, :0]
    for b in order:
        row = row_keys[b, : row_lengths[b]]
        overlap = min(len(previous), len(row))
        differs = previous[:overlap] != row[:overlap]
        first = int(differs.argmax()) if overlap else 0
        shared.append((b, first if overlap and differs[first] else overlap))
        previous = row
    return shared


def _compress(parent: Ints, end: Ints) -> Ints:
    """Runs of tokens that nothing branches off from: start, stop and subtree end of each, [N, 3]."""
    begins = np.ones(len(parent), bool)
    begins[1:] = (parent[1:] != np.arange(len(parent) - 1)) | (end[1:] != end[:-1])
    starts = np.flatnonzero(begins)
    return np.stack([starts, np.append(starts[1:], len(parent)), end[starts]], axis=1)
