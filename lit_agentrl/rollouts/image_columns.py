"""Keyed contexts in the columns of a batch, and what the model's forward takes for a part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lit_agentrl.rollouts.image_tokens import ImageTokens


class ImageColumns:
    """What the columns of R rows show, [R, C]: tokens of text, and features of pictures one by one.

    A forward may begin and end inside a picture, because every placeholder has its own feature and positions.
    """

    def __init__(self, images: ImageTokens, num_rows: int, num_columns: int) -> None:
        """Columns without tokens."""
        self._images = images
        not_an_image = int(images.image_token_id == 0)
        self._token_ids = np.full((num_rows, num_columns), not_an_image, dtype=np.int64)
        self._numbers = np.full((num_rows, num_columns), -1, dtype=np.int64)
        self._offsets = np.zeros((num_rows, num_columns), dtype=np.int64)
        self._positions = np.zeros((3, num_rows, num_columns), dtype=np.int64)
        self.shifts = np.zeros(num_rows, dtype=np.int64)
        """[R], what to add to the place of a token after a row to get its rotary position."""

    def place(self, row: int, columns: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Put a keyed context, or the beginning of one, into a row: `ids` [L] at `columns` [L]."""
        layout = self._images.layout(ids)
        self._token_ids[row, columns] = np.where(layout.numbers < 0, ids, self._images.image_token_id)
        self._numbers[row, columns] = layout.numbers
        self._offsets[row, columns] = layout.offsets
        self._positions[:, row, columns] = layout.positions
        self.shifts[row] = layout.shift

    def inputs(self, rows: slice, columns: slice) -> dict[str, Any]:
        """The arguments of the model's forward over these columns that are not those of text."""
        images, device = self._images, self._images.model.device
        numbers = self._numbers[rows, columns]
        is_shown = numbers >= 0
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(self._token_ids[rows, columns]).to(device)}
        if images.family.has_grid:
            inputs["position_ids"] = torch.from_numpy(self._positions[:, rows, columns]).to(device)
        if not images.family.is_causal:
            inputs["token_type_ids"] = torch.from_numpy(is_shown).to(device).long()
        if is_shown.any():
            offsets = self._offsets[rows, columns]
            inputs["mm_encoder_outputs"] = images.features.at(numbers[is_shown], offsets[is_shown])
        return inputs


def whole_rows(images: ImageTokens, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the model's forward takes for keyed contexts of one length, from their first tokens to their last."""
    columns = ImageColumns(images, len(rows), len(rows[0]))
    for index, row in enumerate(rows):
        columns.place(index, np.arange(len(row)), np.array(row))
    return columns.inputs(slice(None), slice(None))
