"""From trajectories to training batches: rows, optimiser steps, micro-batches of equal count on every rank.

A row is a maximal run of steps whose contexts extend one another: an episode whose turns were appended is one row, an
episode whose prompt was rebuilt at every step is one row a step. Only sampled tokens carry a loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image, ImageReader, same_images
from lit_agentrl.models.prefix_tree import PackedTree, plan_packs
from lit_agentrl.models.scoring import MIN_REUSE
from lit_agentrl.types import Advantages, Credit, Step, TrainBatch, Trajectory, TrajectoryGroup

Reduce = Callable[[list[int], str], list[int]]
"""Reduces integers over ranks; the second argument is "sum" or "max"."""
Sum = Callable[[list[float]], list[float]]
"""Adds up over ranks."""


@dataclass(slots=True)
class Row:
    """One training sequence: L tokens, which of them were sampled, and what each is worth."""

    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """What each token counts, 0 on context; empty where sampled tokens all count 1."""
    images: tuple[Image, ...] = ()
    """What `token_ids` has placeholders for."""

    @property
    def num_action_tokens(self) -> int:
        """How many tokens of the row carry a loss."""
        return sum(self.action_mask)

    @property
    def weight(self) -> float:
        """What its sampled tokens count together."""
        return sum(self.weights) if self.weights else float(self.num_action_tokens)

    def extend(
        self,
        token_ids: Sequence[int],
        logprobs: list[float] | None = None,
        advantage: float = 0.0,
        weight: float | None = None,
    ) -> None:
        """Append context tokens, or, with their log-probabilities, sampled ones."""
        self.token_ids += token_ids
        self.action_mask += [logprobs is not None] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else logprobs
        self.advantages += [advantage] * len(token_ids)
        self.weights += [] if weight is None else [weight] * len(token_ids)


def to_rows(
    groups: Sequence[TrajectoryGroup],
    advantages: Sequence[Advantages],
    keep: Callable[[Trajectory, list[float]], bool] | None = None,
    credit: Credit = "sum",
) -> list[list[Row]]:
    """The rows of every group, [P][rows]; a trajectory that failed, has no step, or is refused by `keep` gives none.

    A step that trajectories share (the same `Step` object: it was sampled once) is in the rows of each; `credit` says
    what it counts there. Only trajectories that give rows are counted. With `sum`, rows carry no weights.
    """
    rows: list[list[Row]] = []
    for group, group_advantages in zip(groups, advantages, strict=True):
        kept = [
            (trajectory, values)
            for trajectory, values in zip(group.trajectories, group_advantages, strict=True)
            if not trajectory.stop_reason.is_failure and (keep is None or keep(trajectory, values))
        ]
        leaves = Counter(id(step) for trajectory, _ in kept for step in trajectory.steps)
        rows.append([])
        for trajectory, values in kept:
            shares = None
            if credit != "sum":
                shares = [leaves[id(step)] ** _CREDIT_POWERS[credit] for step in trajectory.steps]
            rows[-1] += trajectory_rows(trajectory, values, shares)
    return rows


def trajectory_rows(
    trajectory: Trajectory, advantages: Sequence[float], weights: Sequence[float] | None = None
) -> list[Row]:
    """Split one trajectory into maximal runs of steps whose context extends the row so far; `weights` [K] of steps."""
    rows: list[Row] = []
    for k, (step, advantage) in enumerate(zip(trajectory.steps, advantages, strict=True)):
        if not step.action_ids:
            continue
        seen = len(rows[-1].token_ids) if rows else 0
        if not rows or not _extends(step, rows[-1]):
            rows.append(Row())
            seen = 0
        rows[-1].images = step.images
        rows[-1].extend(step.context_ids[seen:], weight=None if weights is None else 0.0)
        rows[-1].extend(step.action_ids, step.logprobs, advantage, None if weights is None else weights[k])
    return rows


def _extends(step: Step, row: Row) -> bool:
    """Whether everything of the row, its images too, is where the step's context begins."""
    seen = step.context_ids[: len(row.token_ids)]
    return seen == row.token_ids and same_images(step.images[: len(row.images)], row.images)


def split_updates(rows_by_group: Sequence[list[Row]], num_updates: int) -> list[list[Row]]:
    """Deal whole groups to `num_updates` optimiser steps; a group, so a tree, is never torn between two."""
    return [[row for rows in rows_by_group[start::num_updates] for row in rows] for start in range(num_updates)]


def plan_micro_batches(
    rows: Sequence[Row], max_tokens: int, *, shared: bool, reader: ImageReader | None = None
) -> list[list[int]]:
    """Row indices of each micro-batch under a token budget.

    Args:
        rows: The rows of one optimiser step on this rank.
        max_tokens: Unique tokens a micro-batch may hold when prefixes are shared, padded tokens otherwise.
        shared: Whether the forward encodes shared prefixes once.
        reader: Of the rows' images: what is equal text need not be an equal prefix.

    Raises:
        UserError: A single row is longer than the budget.
    """
    longest = max((len(row.token_ids) for row in rows), default=0)
    if longest > max_tokens:
        raise UserError(
            f"max_tokens={max_tokens} is below the longest row ({longest} tokens). Raise --data.max_tokens, or lower "
            "--data.max_length so that episodes end earlier."
        )
    if not rows:
        return []
    if shared:
        batch = collate(rows, 0, 0, reader=reader)
        keys = None if batch.vision is None else batch.vision.keys(batch.token_ids, batch.lengths)
        packs = plan_packs(batch.token_ids, batch.lengths, max_tokens, keys)
        return [part for pack in packs for part in _within_budget(rows, pack, max_tokens, batch, keys)]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids), i))  # like lengths together: least padding
    plan: list[list[int]] = [[]]
    for i in order:
        if plan[-1] and (len(plan[-1]) + 1) * len(rows[i].token_ids) > max_tokens:
            plan.append([])
        plan[-1].append(i)
    return plan


def _within_budget(
    rows: Sequence[Row], pack: list[int], max_tokens: int, batch: TrainBatch, keys: Tensor | None
) -> list[list[int]]:
    """The pack itself, or, where its rows share too little to be shared and would be padded, smaller parts of it."""
    lengths = batch.lengths[pack]
    fits_padded = int(lengths.max()) * len(pack) <= max_tokens
    if fits_padded:
        return [pack]
    tree = PackedTree.build(batch.token_ids[pack], lengths, None if keys is None else keys[pack])
    if tree.reuse >= MIN_REUSE:
        return [pack]
    parts = plan_micro_batches([rows[i] for i in pack], max_tokens, shared=False)
    return [[pack[i] for i in part] for part in parts]


def assemble(
    updates: Sequence[list[Row]],
    max_tokens: int,
    reduce: Reduce,
    *,
    shared: bool,
    temperature: float = 1.0,
    sum_weights: Sum | None = None,
    reader: ImageReader | None = None,
) -> tuple[list[TrainBatch], int]:
    """The micro-batches of all optimiser steps, in order, and how many make one step.

    The count is the same for every step and every rank: Lightning accumulates a fixed number, and ranks that run out of
    batches would leave their peers waiting. What is missing is filled with batches that carry no loss. Denominators are
    global: `num_action_tokens` and `num_rows` count the whole optimiser step on all ranks. Where rows carry weights,
    `sum_weights` adds theirs up; it is given on every rank or on none.
    """
    plans = [plan_micro_batches(rows, max_tokens, shared=shared, reader=reader) for rows in updates]
    per_step = max(1, *reduce([len(plan) for plan in plans], "max"))
    totals = reduce([n for rows in updates for n in (sum(r.num_action_tokens for r in rows), len(rows))], "sum")
    weights = None
    if sum_weights is not None:
        weights = sum_weights([total for rows in updates for total in _total_weights(rows)])
    batches: list[TrainBatch] = []
    for number, (rows, plan) in enumerate(zip(updates, plans, strict=True)):
        num_action_tokens, num_rows = totals[2 * number], totals[2 * number + 1]
        for micro in range(per_step):
            chosen = [rows[i] for i in plan[micro]] if micro < len(plan) else [_EMPTY]
            batch = collate(chosen, num_action_tokens, num_rows, temperature, reader)
            batch.num_updates = len(updates)
            if weights is not None:
                batch.total_weight, batch.total_row_weight = weights[2 * number], weights[2 * number + 1]
            batches.append(batch)
    return batches, per_step


def _total_weights(rows: Sequence[Row]) -> tuple[float, float]:
    """What the sampled tokens count together, and what the rows do, each as its sampled tokens do on average."""
    return sum(row.weight for row in rows), sum(row.weight / row.num_action_tokens for row in rows)


def collate(
    rows: Sequence[Row],
    num_action_tokens: int,
    num_rows: int,
    temperature: float = 1.0,
    reader: ImageReader | None = None,
) -> TrainBatch:
    """Right-padded tensors [B, L] of some rows, with their images where a `reader` makes them the model's inputs."""
    lengths = [len(row.token_ids) for row in rows]
    shape = (len(rows), max(lengths))
    token_ids = torch.zeros(shape, dtype=torch.int64)
    action_mask = torch.zeros(shape, dtype=torch.bool)
    old_logprobs, advantages = torch.zeros(shape), torch.zeros(shape)
    weights = torch.zeros(shape) if any(row.weights for row in rows) else None
    for b, row in enumerate(rows):
        n = lengths[b]
        token_ids[b, :n] = torch.tensor(row.token_ids)
        action_mask[b, :n] = torch.tensor(row.action_mask)
        old_logprobs[b, :n] = torch.tensor(row.logprobs)
        advantages[b, :n] = torch.tensor(row.advantages)
        if weights is not None:
            weights[b, :n] = torch.tensor(row.weights or row.action_mask)
    row_lengths = torch.tensor(lengths)
    return TrainBatch(
        token_ids=token_ids,
        lengths=row_lengths,
        action_mask=action_mask,
        old_logprobs=old_logprobs,
        advantages=advantages,
        num_action_tokens=num_action_tokens,
        num_rows=num_rows,
        temperature=temperature,
        weights=weights,
        vision=None if reader is None else reader.inputs([row.images for row in rows], token_ids, row_lengths),
    )


_CREDIT_POWERS = {"sum": 0.0, "mean": -1.0, "sqrt": -0.5}
# Two tokens and no loss: what a rank trains on while its peers still have rows.
_EMPTY = Row([0, 0], [False, False], [0.0, 0.0], [0.0, 0.0])
