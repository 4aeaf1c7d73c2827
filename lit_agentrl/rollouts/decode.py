"""One batch of sequences: prefill what is new, then decode in lockstep until every sequence has ended."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from lit_agentrl.rollouts.image_columns import ImageColumns
from lit_agentrl.rollouts.kv_cache import KVRows, RowsView
from lit_agentrl.rollouts.prefill import plan_prefill, shared_prefixes
from lit_agentrl.rollouts.prefix_store import RetainedRow, num_packed, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lit_agentrl.rollouts.driver import CausalDriver
    from lit_agentrl.rollouts.image_tokens import ImageTokens
    from lit_agentrl.rollouts.prefill import PrefillPlan
    from lit_agentrl.rollouts.prefix_store import PrefixStore
    from lit_agentrl.rollouts.sampling import Actions


class FilledRows:
    """Rows of keys and values with the position of every column, [R, C], -1 where a column holds no token."""

    def __init__(
        self, driver: CausalDriver, plan: PrefillPlan, num_rows: int, num_extra: int, images: ImageTokens | None
    ) -> None:
        """Allocate `num_rows` for a plan (at least its own rows), with `num_extra` columns to decode into."""
        self.driver = driver
        self.plan = plan
        self.token_ids = np.zeros((num_rows, plan.end), dtype=np.int64)
        self.positions = np.full((num_rows, plan.end), -1, dtype=np.int64)
        self.images = None if images is None else ImageColumns(images, len(plan.rows), plan.end)
        for chunk in plan.chunks:
            for i in range(chunk.start, chunk.stop):
                row = plan.rows[i]
                columns = row.columns(plan.end, plan.width(chunk))
                self.positions[i, columns] = np.arange(len(columns))
                self.token_ids[i, columns] = unpack(row.key)
                if self.images is not None:
                    self.images.place(i, columns, unpack(row.key))
        gaps = np.flatnonzero((self.positions[: len(plan.rows)] < 0).any(0))
        self.kv = KVRows(num_rows, plan.end + num_extra, gaps)

    def columns(self, row: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The columns of a prefilled row's tokens, in their order."""
        return np.flatnonzero(self.positions[row] >= 0)

    def prefill(self, max_tokens: int) -> Tensor:
        """Copy what is cached and compute the rest, at most `max_tokens` a forward; logits [n, V] of its rows."""
        logits = []
        for chunk in self.plan.chunks:
            self._copy_cached(chunk)
            logits.append(self._compute(chunk, max_tokens))
        return torch.cat(logits)

    def _copy_cached(self, chunk: slice) -> None:
        indices = range(chunk.start, chunk.stop)
        rows = self.plan.rows
        for (_, num_cached), members in groupby(indices, key=lambda i: (id(rows[i].source), rows[i].num_cached)):
            first, *others = members
            source = rows[first].source
            if source is not None:
                target = slice(first, first + 1 + len(others))
                start = int(self.columns(first)[0])
                self.kv.copy(target, start, source.kv, source.row, source.columns[:num_cached])

    def _compute(self, chunk: slice, max_tokens: int) -> Tensor:
        device = self.driver.lm.device
        end, first = self.plan.end, self.plan.end - self.plan.width(chunk)
        view = RowsView(self.kv, chunk, start=0, length=first)
        view.start = int((self.positions[chunk] >= 0).any(0).argmax())
        positions = torch.from_numpy(self.positions[chunk]).to(device)
        token_ids = torch.from_numpy(self.token_ids[chunk]).to(device)
        piece = max(1, max_tokens // (chunk.stop - chunk.start))
        logits = None
        for start in range(first, end, piece):
            stop = min(start + piece, end)
            images = None if self.images is None else self.images.inputs(chunk, slice(start, stop))
            logits = self.driver.forward(
                token_ids[:, start:stop], positions[:, start:stop], positions[:, view.start : stop], view, images
            )
        assert logits is not None  # a row has at least one new token
        return logits


def prefill_shared(
    driver: CausalDriver, keys: Sequence[bytes], store: PrefixStore, max_tokens: int, images: ImageTokens | None = None
) -> dict[bytes, int]:
    """Compute the prefixes that several contexts share, into the store; the tokens spent, by the first context's key.

    Args:
        driver: Runs the model.
        keys: Different contexts, in the order of the call.
        store: Where prefixes are looked up and kept.
        max_tokens: Most tokens of one forward.
        images: Pictures that the contexts show; None where they are text.
    """
    order = {key: index for index, key in enumerate(keys)}
    ordered = sorted(keys)
    cached = [store.longest_prefix(key)[1] for key in ordered]
    spent: dict[bytes, int] = {}
    for wave in shared_prefixes(ordered, cached):
        plan = plan_prefill([prefix for prefix, _ in wave], store, max_tokens)
        filled = FilledRows(driver, plan, len(plan.rows), 0, images)
        filled.prefill(max_tokens)
        store.add(RetainedRow(row.key, filled.kv, i, filled.columns(i)) for i, row in enumerate(plan.rows))
        for row in plan.rows:
            first = min((ordered[member] for member in wave[row.index][1]), key=order.__getitem__)
            spent[first] = spent.get(first, 0) + row.num_new
    return spent


class DecodeBatch:
    """B sequences in the rows of one buffer. Rows that have ended move behind the live ones and cost nothing more."""

    def __init__(
        self,
        driver: CausalDriver,
        store: PrefixStore,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        max_prefill_tokens: int,
        images: ImageTokens | None = None,
    ) -> None:
        """Prefill `contexts`, each different one once.

        Args:
            driver: Runs the model.
            store: Where prefixes are looked up and kept.
            contexts: B token sequences.
            max_new_tokens: Room to decode into.
            max_prefill_tokens: Most tokens of one forward.
            images: Pictures that the contexts show; None where they are text.
        """
        self.keys = [pack(context) for context in contexts]
        self.num_prefilled = [0] * len(contexts)
        members: dict[bytes, list[int]] = {}
        for sequence, key in enumerate(self.keys):
            members.setdefault(key, []).append(sequence)
        for key, count in prefill_shared(driver, list(members), store, max_prefill_tokens, images).items():
            self.num_prefilled[members[key][0]] += count

        plan = plan_prefill(list(members), store, max_prefill_tokens)
        # the last sampled token is never fed, so it needs no column
        self._filled = FilledRows(driver, plan, len(contexts), max_new_tokens - 1, images)
        self._driver, self._store = driver, store
        logits = self._filled.prefill(max_prefill_tokens)
        for row in plan.rows:
            self.num_prefilled[members[row.key][0]] += row.num_new
        origins = self._fan_out(members)
        self.logits = logits[origins]
        self._shifts = self._rotary_shifts(origins)

    def _fan_out(self, members: dict[bytes, list[int]]) -> list[int]:
        """Copy every prefilled row to the other members of its group: the prefilled row of each row, [B]."""
        filled, plan = self._filled, self._filled.plan
        self.sequences = [members[row.key][0] for row in plan.rows]  # of each row
        origins = list(range(len(plan.rows)))
        for i, row in enumerate(plan.rows):
            others = members[row.key][1:]
            rows = slice(len(origins), len(origins) + len(others))
            first = int(filled.columns(i)[0])
            if others:
                filled.kv.copy(rows, first, filled.kv, i, np.arange(first, plan.end))
            filled.positions[rows] = filled.positions[i]
            origins += [i] * len(others)
            self.sequences += others
        return origins

    def run(self, actions: Actions, sequences: Sequence[int]) -> None:
        """Decode until every action is complete, then retain all rows in the store.

        Args:
            actions: Samples the tokens and records them.
            sequences: [B], what `actions` calls each context.
        """
        positions = self._all_positions()
        view = RowsView(
            self._filled.kv, slice(0, len(sequences)), start=self._first_column(), length=self._filled.plan.end
        )
        running = list(range(len(sequences)))
        tokens = torch.zeros(len(sequences), dtype=torch.int64, device=positions.device)
        logits, shifts = self.logits, self._shifts
        while True:
            rows = slice(None) if len(running) == len(logits) else running
            tokens[rows], is_complete = actions.extend(
                logits[rows], [sequences[self.sequences[row]] for row in running]
            )
            running = [row for row, done in zip(running, is_complete, strict=True) if not done]
            if not running:
                break
            if len(tokens) - len(running) >= max(
                1, len(tokens) // 8
            ):  # a swap costs about as much as two steps of a row
                order = self._compact(running, len(tokens), view)
                tokens, positions, running = tokens[order], positions[order], list(range(len(order)))
                shifts = None if shifts is None else shifts[order]
            newest = view.length
            places = positions[:, newest : newest + 1]
            images = None if shifts is None else {"position_ids": places + shifts}
            logits = self._driver.forward(tokens[:, None], places, positions[:, view.start : newest + 1], view, images)
        self._retain([actions.token_ids[sequence] for sequence in sequences])

    def _all_positions(self) -> Tensor:
        """Position of every column, [B, C]: the context's, then one more for each decoded token."""
        end, total = self._filled.plan.end, self._filled.kv.num_columns
        lengths = np.array([num_packed(self.keys[sequence]) for sequence in self.sequences])
        decoded = lengths[:, None] + np.arange(total - end)
        return torch.from_numpy(np.concatenate([self._filled.positions, decoded], axis=1)).to(self.logits.device)

    def _rotary_shifts(self, origins: list[int]) -> Tensor | None:
        """By how much the rotary positions of decoded tokens differ from their places, [B, 1]; None: by nothing."""
        images = self._filled.images
        if images is None or not images.shifts.any():
            return None
        return torch.from_numpy(images.shifts[origins, None]).to(self.logits.device)

    def _first_column(self, num_rows: int | None = None) -> int:
        """The first column that any of the first rows uses."""
        return int((self._filled.positions[:num_rows] >= 0).any(0).argmax())

    def _compact(self, running: list[int], num_rows: int, view: RowsView) -> list[int]:
        """Move `running` rows to the front, by swaps so that complete rows stay retained; the old place of each."""
        num_running = len(running)
        movers = [row for row in running if row >= num_running]
        holes = sorted(set(range(num_running)) - set(running))
        order = list(range(num_rows))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole], order[mover] = mover, hole
        if movers:
            self._filled.kv.swap(holes, movers, view.length)
            self._filled.positions[:num_rows] = self._filled.positions[order]
            self.sequences[:num_rows] = [self.sequences[row] for row in order]
        view.rows = slice(0, num_running)
        view.start = self._first_column(num_running)
        return order[:num_running]

    def _retain(self, token_ids: Sequence[Sequence[int]]) -> None:
        """Keep every row: its context, and the decoded tokens but the last, which was never fed."""
        filled, end = self._filled, self._filled.plan.end
        filled.kv.trim(end + max(map(len, token_ids)) - 1)
        retained = []
        for row, sequence in enumerate(self.sequences):
            fed = token_ids[sequence][:-1]
            columns = np.concatenate([filled.columns(row), np.arange(end, end + len(fed))])
            retained.append(RetainedRow(self.keys[sequence] + pack(fed), filled.kv, row, columns))
        self._store.add(retained)
        self._store.evict()
