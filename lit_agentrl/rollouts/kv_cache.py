"""Keys and values in preallocated rows, written in place, and the view of them that a transformers model fills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


class KVRows:
    """Keys and values of R rows in C columns, for every layer [R, Hkv, C, D].

    A row's tokens may leave gaps between columns: who reads knows each token's column. Layers are allocated when they
    are first written, since only then are their head count, width and dtype known.
    """

    def __init__(self, num_rows: int, num_columns: int, gaps: NDArray[np.int64]) -> None:
        """Plan the rows.

        Args:
            num_rows: R.
            num_columns: C.
            gaps: Columns that some row will never write though they are read. They start as zeros, because a masked
                column still takes part with weight 0, and 0 x NaN of uninitialised memory is NaN.
        """
        self.num_rows = num_rows
        self.num_columns = num_columns
        self._gaps = torch.from_numpy(gaps)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_tokens(self) -> int:
        """Columns of all rows, used or not: what it costs to keep."""
        return self.num_rows * self.num_columns

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer; heads, width, dtype and device are those of `keys` and `values` [*, Hkv, *, D]."""
        buffers = self._layers.get(index)
        if buffers is None:
            buffers = self._layers[index] = (self._allocate(keys), self._allocate(values))
        return buffers

    def _allocate(self, like: Tensor) -> Tensor:
        buffer = like.new_empty(self.num_rows, like.shape[1], self.num_columns, like.shape[3])
        if len(self._gaps):  # only these: on a CPU, first touching all the memory costs as much as copying it
            buffer.index_fill_(2, self._gaps.to(buffer.device), 0)
        return buffer

    def copy(self, rows: slice, first: int, source: KVRows, source_row: int, columns: NDArray[np.int64]) -> None:
        """Copy `columns` of one row of `source` to each of `rows`, from column `first` on."""
        runs = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1) if len(columns) else []
        for index, buffers in source._layers.items():
            for target, origin in zip(self.layer(index, *buffers), buffers, strict=True):
                start = first
                for run in runs:
                    stop = start + len(run)
                    target[rows, :, start:stop] = origin[source_row, :, int(run[0]) : int(run[-1]) + 1]
                    start = stop

    def swap(self, rows: Sequence[int], others: Sequence[int], num_columns: int) -> None:
        """Exchange `rows` with `others` in the first `num_columns` columns."""
        for buffers in self._layers.values():
            for buffer in buffers:
                used = buffer[:, :, :num_columns]
                used[[*rows, *others]] = used[[*others, *rows]]

    def trim(self, num_columns: int) -> None:
        """Give back the columns after the first `num_columns` when they are at least a quarter of the memory."""
        if 4 * num_columns > 3 * self.num_columns:
            return
        for index, (keys, values) in self._layers.items():
            self._layers[index] = (keys[:, :, :num_columns].clone(), values[:, :, :num_columns].clone())
        self.num_columns = num_columns


class RowsView(Cache):
    """The part of `KVRows` that one forward works on: a slice of rows, columns from `start` up to the newest."""

    def __init__(self, kv: KVRows, rows: slice, start: int, length: int) -> None:
        """Look at `rows` of `kv`; the next forward writes from column `length` on and sees columns from `start` on."""
        super().__init__(layers=[])
        self.kv = kv
        self.rows = rows
        self.start = start
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values in place; all visible ones, [r, Hkv, end - start, D], without a copy."""
        keys, values = self.kv.layer(layer_idx, key_states, value_states)
        end = self.length + key_states.shape[2]
        keys[self.rows, :, self.length : end] = key_states
        values[self.rows, :, self.length : end] = value_states
        return keys[self.rows, :, self.start : end], values[self.rows, :, self.start : end]

    def advance(self, num_columns: int) -> None:
        """Keep what the last forward wrote: the next one writes after it."""
        self.length += num_columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the next write. Not a token count: rows have gaps, so positions are always passed."""
        return self.length - self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Width of the keys of the next forward, and their offset."""
        return self.length - self.start + query_length, 0
