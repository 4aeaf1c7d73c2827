"""Loss and backward on the rows of trees and chains, with and without shared prefixes, for `tree_budget.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from prefix_batches import Batch
from prefix_sides import Scorer, loss_and_gradients, padded, shared
from prefix_tables import markdown
from torch import Tensor, nn
from transformers import PreTrainedModel
from tree_rollouts import times

from lit_agentrl.models import PackedTree
from lit_agentrl.rows import to_rows
from lit_agentrl.types import TrajectoryGroup


@dataclass(frozen=True)
class Update:
    """One loss and backward."""

    core: float
    """Seconds of this process's cores."""
    seconds: float
    """On the clock."""
    logprobs: Tensor
    """[B, L]."""
    gradients: list[Tensor]
    """Of every weight, in the first repeat."""


@dataclass(frozen=True)
class Compared:
    """The same rows both ways, once a repeat."""

    batch: Batch
    rows_at_a_time: int
    """The padded side's fastest micro-batch."""
    padded: list[Update]
    shared: list[Update]

    @property
    def packed(self) -> PackedTree:
        """What the shared side computes."""
        return PackedTree.build(self.batch.token_ids, self.batch.lengths)


def first_layers(lm: PreTrainedModel, number: int) -> PreTrainedModel:
    """The model cut, in place, to its first layers: they are alike, and all of them take long on one core."""
    lm.model.layers = lm.model.layers[:number]
    lm.config.num_hidden_layers = len(lm.model.layers)
    return lm


def batch_of(groups: Sequence[TrajectoryGroup]) -> Batch:
    """The rows of these groups, with made-up advantages."""
    zeros = [[[0.0] * len(t.steps) for t in group.trajectories] for group in groups]
    rows = [row for of_group in to_rows(groups, zeros) for row in of_group]
    batch = Batch.of([torch.tensor(row.token_ids) for row in rows], [[] for _ in rows])
    masks = [torch.tensor(row.action_mask) for row in rows]
    return replace(batch, targets=torch.nn.utils.rnn.pad_sequence(masks, batch_first=True))


def update(lm: nn.Module, scorer: Scorer, parts: list[Batch], batch: Batch) -> Update:
    """Loss and backward, one after another for `parts`."""
    lm.zero_grad()
    began, worked = time.perf_counter(), time.process_time()
    logprobs = loss_and_gradients(scorer, parts, batch)
    core, seconds = time.process_time() - worked, time.perf_counter() - began
    gradients = [weight.grad for weight in lm.parameters() if weight.grad is not None]
    return Update(core, seconds, logprobs, gradients)


def compare(lm: nn.Module, groups: Sequence[TrajectoryGroup], repeats: int) -> Compared:
    """Both sides in turn, after one trial of every micro-batch of the padded side."""
    batch = batch_of(groups)
    ways = {"padded": padded(lm), "shared": shared(lm)}
    sizes = sorted({1, 2, len(batch)})
    trials = {size: update(lm, ways["padded"], batch.micro_batches(size), batch).core for size in sizes}
    best = min(sizes, key=trials.__getitem__)
    print(f"{len(batch)} rows; padded, seconds by rows at a time: {trials}", flush=True)
    parts = {"padded": batch.micro_batches(best), "shared": [batch]}
    found: dict[str, list[Update]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways)[:: 1 if repeat % 2 == 0 else -1]:
            done = update(lm, ways[name], parts[name], batch)
            found[name].append(replace(done, gradients=[]) if repeat else done)  # those of one repeat are enough
    return Compared(batch, best, found["padded"], found["shared"])


def update_table(compared: dict[str, Compared]) -> list[str]:
    """Tokens, seconds and errors of every batch."""
    rows = []
    for name, each in compared.items():
        packed = each.packed
        rows.append(
            [
                name,
                f"{packed.num_row_tokens:,}",
                f"{each.batch.token_ids.numel():,}",
                f"{len(packed):,}",
                f"{packed.reuse:.2f}",
                f"{_seconds(each.padded)} [{each.rows_at_a_time}]",
                _seconds(each.shared),
                times([a.core / b.core for a, b in zip(each.padded, each.shared, strict=True)]),
                f"{gradient_error(each.padded[0].gradients, each.shared[0].gradients):.1e}",
                f"{float((each.padded[0].logprobs - each.shared[0].logprobs).abs().max()):.1e}",
            ]
        )
    header = (
        "rows of", "row tokens", "padded tokens", "unique tokens", "reuse", "padded: core s (clock) [rows]",
        "shared: core s (clock)", "padded over shared", "gradient error", "log-probability error",
    )  # fmt: skip
    return markdown(header, rows)


def gradient_error(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """|g - g'| / |g| over all weights, Euclidean."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(wanted, found, strict=True))
    return float((difference / sum(float(a.double().square().sum()) for a in wanted)) ** 0.5)


def _seconds(updates: Sequence[Update]) -> str:
    core, clock = (statistics.median(of) for of in ([u.core for u in updates], [u.seconds for u in updates]))
    return f"{core:.2f} ({clock:.2f})"
