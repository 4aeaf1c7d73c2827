"""The rows that are looked at: those of the collected optimiser step, in the order of their prefix tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_agentrl.models.prefix_tree import PackedTree, plan_packs
from lit_agentrl.rows import Row, plan_micro_batches
from lit_agentrl.types import TrainBatch


@runtime_checkable
class PerRow(Protocol):
    """What a batch holds of each row beside tensors: images, say."""

    def rows(self, indices: Sequence[int]) -> Any:
        """The same of some rows."""
        ...

    def keys(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, L], which tokens are equal."""
        ...


@dataclass(frozen=True)
class Reuse:
    """How much rows have in common."""

    num_rows: int
    row_tokens: int
    padded_tokens: int
    """B x L, summed over micro-batches: what the padded forward computes of the same micro-batches."""
    unique_tokens: int

    @property
    def ratio(self) -> float:
        """Row tokens per unique token; 1 where nothing is shared."""
        return self.row_tokens / self.unique_tokens

    @property
    def padded_ratio(self) -> float:
        """Padded tokens per unique token."""
        return self.padded_tokens / self.unique_tokens


def reuse_of(batches: Sequence[TrainBatch]) -> Reuse:
    """Counted over micro-batches: what two of them have in common is computed twice, so it is no reuse."""
    trees = [tree_of(batch) for batch in batches]
    return Reuse(
        num_rows=sum(len(batch.lengths) for batch in batches),
        row_tokens=sum(tree.num_row_tokens for tree in trees),
        padded_tokens=sum(len(batch.lengths) * int(batch.lengths.max()) for batch in batches),
        unique_tokens=sum(len(tree) for tree in trees),
    )


def tree_of(batch: TrainBatch) -> PackedTree:
    """The prefix tree of a batch."""
    return PackedTree.build(batch.token_ids, batch.lengths, _keys(batch))


def trained_rows(batches: Sequence[TrainBatch]) -> list[TrainBatch]:
    """The micro-batches without those that only keep ranks in step."""
    return [batch for batch in batches if batch.action_mask.any()]


def joined(batches: Sequence[TrainBatch]) -> TrainBatch:
    """All rows as one batch; where it holds more than tensors, the micro-batch with the most rows."""
    if any(isinstance(value, PerRow) for _, value in _values(batches[0])):
        return max(batches, key=lambda batch: len(batch.lengths))
    longest = max(batch.token_ids.shape[1] for batch in batches)
    tensors: dict[str, Any] = {}
    for name, value in _values(batches[0]):
        if isinstance(value, Tensor):
            tensors[name] = torch.cat([_widened(getattr(batch, name), longest) for batch in batches])
    return replace(batches[0], **tensors)


def select(batch: TrainBatch, indices: Sequence[int]) -> TrainBatch:
    """Some rows of a batch, as wide as before."""
    chosen: dict[str, Any] = {}
    for name, value in _values(batch):
        if isinstance(value, Tensor):
            chosen[name] = value[list(indices)]
        elif isinstance(value, PerRow):
            chosen[name] = value.rows(indices)
    return replace(batch, **chosen)


def in_tree_order(batch: TrainBatch) -> TrainBatch:
    """The rows depth-first, so that the first n of them share as much as any n neighbours do."""
    (order,) = plan_packs(batch.token_ids, batch.lengths, batch.token_ids.numel(), _keys(batch))
    return select(batch, order)


def weighted(batch: TrainBatch) -> TrainBatch:
    """The batch with a random advantage per row, N(0, 1): real ones are 0 where all trajectories earned the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(batch.lengths), 1, generator=generator)
    return replace(batch, advantages=weight * batch.action_mask, num_action_tokens=int(batch.action_mask.sum()))


def padded_plan(batch: TrainBatch, max_tokens: int) -> list[list[int]]:
    """Row indices of each micro-batch of at most `max_tokens` padded tokens, as training plans them."""
    rows = [Row(token_ids=[0] * length) for length in batch.lengths.tolist()]
    return plan_micro_batches(rows, max(max_tokens, int(batch.lengths.max())), shared=False)


def packed_plan(batch: TrainBatch, max_tokens: int) -> list[list[int]]:
    """Row indices of each micro-batch of at most `max_tokens` unique tokens, as training plans them."""
    return plan_packs(batch.token_ids, batch.lengths, max_tokens, _keys(batch))


def _keys(batch: TrainBatch) -> Tensor | None:
    for _, value in _values(batch):
        if isinstance(value, PerRow):
            return value.keys(batch.token_ids, batch.lengths)
    return None


def _values(batch: TrainBatch) -> list[tuple[str, Any]]:
    return [(field.name, getattr(batch, field.name)) for field in fields(batch)]


def _widened(value: Tensor, longest: int) -> Tensor:
    """[B, L] padded on the right; [B] as it is."""
    return value if value.ndim < 2 else torch.nn.functional.pad(value, (0, longest - value.shape[1]))
