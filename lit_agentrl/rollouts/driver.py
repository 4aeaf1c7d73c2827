"""Drives a causal transformers model over `KVRows` with explicit positions and masks, after testing that it can."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel

from lit_agentrl.rollouts.grouped_attention import text_config
from lit_agentrl.rollouts.kv_cache import KVRows, RowsView

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"


class UndrivableModelError(RuntimeError):
    """The model needs more than keys, values, positions and a mask to continue a sequence."""


class CausalDriver:
    """One forward at a time over rows whose tokens lie anywhere in the columns; the mask puts them in order."""

    def __init__(self, lm: PreTrainedModel) -> None:
        """Read from the configuration which masks the layers take.

        Raises:
            UndrivableModelError: If a layer is neither full nor sliding-window attention.
        """
        self.lm = lm
        config = text_config(lm)
        layer_types = set(getattr(config, "layer_types", None) or [])
        if not layer_types <= {FULL, SLIDING}:
            raise UndrivableModelError(f"its layers are {sorted(layer_types)}")
        self._layer_types = layer_types
        window: int | None = getattr(config, "sliding_window", None)
        # without layer types, a window in the configuration is every layer's (Mistral, Mixtral, Phi-3)
        self._window = window if SLIDING in layer_types or not layer_types else None
        base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
        parameters = inspect.signature(base.forward).parameters
        self._only_last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache = "cache" if "cache" in parameters else "past_key_values"  # its name before transformers 5.24

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        key_positions: Tensor,
        view: RowsView,
        images: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Write the keys and values of new tokens into `view`; the logits [r, V] after each row's last one.

        Args:
            token_ids: [r, q], the next q columns of the view, right-aligned.
            positions: [r, q], -1 where a column holds no token.
            key_positions: [r, K], position of every visible column, the new ones included; -1 where it holds no token.
            view: Rows and columns to read and write.
            images: Arguments of the model's forward that pictures add or put in place of those of text.
        """
        inputs: dict[str, Any] = {"input_ids": token_ids, "position_ids": positions.clamp(min=0), **(images or {})}
        output = self.lm(
            **inputs,
            attention_mask=self._masks(positions, key_positions),
            use_cache=True,
            **{self._cache: view},
            **self._only_last_logits,
        )
        view.advance(token_ids.shape[1])
        logits: Tensor = output.logits[:, -1]
        return logits

    def _masks(self, positions: Tensor, key_positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks [r, 1, q, K]: one for all layers, or one per layer type."""
        queries, keys = positions[:, :, None], key_positions[:, None, :]
        visible = (keys >= 0) & (keys <= queries)
        if self._window is None:
            return self._additive(visible)
        windowed = self._additive(visible & (queries - keys < self._window))
        if not self._layer_types:
            return windowed
        return {FULL: self._additive(visible), SLIDING: windowed}

    def _additive(self, visible: Tensor) -> Tensor:
        """0 where `visible` [r, q, K], else the lowest number, as [r, 1, q, K]."""
        # a column without a token sees itself: a softmax over nothing would put NaN into the cache
        visible[:, :, -visible.shape[1] :].diagonal(dim1=1, dim2=2).fill_(True)
        device = visible.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.lm.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        # the lowest finite number: -inf would give NaN in kernels that meet a block of hidden columns first
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def check(self) -> None:
        """Compare a ragged, cached computation with a plain one, on five tokens.

        Raises:
            UndrivableModelError: If it fails or its logits differ; the text says how.
        """
        ids = torch.arange(1, 6, device=self.lm.device)[None]
        expected = self.lm(input_ids=ids, use_cache=False).logits[0, -1].float()
        if not expected.isfinite().all():
            return  # broken weights say nothing about the model; sampling reports them
        try:
            actual = self._ragged_logits(ids).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # model code we do not know may fail in any way when it is given our cache
            raise UndrivableModelError(f"it does not take 4-D masks and a custom cache ({error!r})") from error
        difference = float((actual - expected).abs().max() / expected.abs().max())
        if difference > torch.finfo(self.lm.dtype).eps ** 0.5:
            raise UndrivableModelError(f"its cached logits differ by {difference:.1e} of the largest one")

    def _ragged_logits(self, ids: Tensor) -> Tensor:
        """The logits [V] after `ids` [1, 5], computed in two forwards beside a shorter row and around a gap."""
        positions = torch.tensor([[-1, 0, 1, 2, -1, -1, 3, 4], [-1, -1, -1, 0, -1, 1, 2, 3]], device=ids.device)
        tokens = torch.where(positions >= 0, ids[0][positions.clamp(min=0)], 0)
        view = RowsView(KVRows(2, 8, np.arange(8)), slice(0, 2), start=0, length=0)
        self.forward(tokens[:, :4], positions[:, :4], positions[:, :4], view)
        view.advance(1)  # column 4 belongs to nobody
        self.forward(tokens[:, 5:7], positions[:, 5:7], positions[:, :7], view)
        return self.forward(tokens[:, 7:], positions[:, 7:], positions, view)[0]
