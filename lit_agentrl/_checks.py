"""The checks in front of advantages and losses: shapes, ids, finite numbers, options. All raise `ValueError`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def checked_values(name: str, values: Tensor) -> Tensor:
    """The values as float64 without gradient, [N]; refuses another rank and what is not finite."""
    if values.dim() != 1:
        raise ValueError(f"{name} must be 1-D, one number per row; got shape {list(values.shape)}.")
    values = values.detach().double()
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite numbers: drop or repair those rows before their group is used.")
    return values


def checked_ids(name: str, ids: Tensor | None, values: Tensor) -> Tensor:
    """The ids, [N]; zeros for None; refuses floats, bools and another length."""
    if ids is None:
        return torch.zeros_like(values, dtype=torch.int64)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integer ids, got {ids.dtype}.")
    check_same_length(name, ids, values)
    return ids


def check_same_length(name: str, rows: Tensor, values: Tensor) -> None:
    """Refuses anything but one entry per value."""
    if rows.shape != values.shape:
        raise ValueError(f"{name} must have shape {list(values.shape)}, one per row; got {list(rows.shape)}.")


def result_dtype(values: Tensor) -> torch.dtype:
    """The dtype of the result: that of the values if they are floats."""
    return values.dtype if values.is_floating_point() else torch.get_default_dtype()


def check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    """Refuses an option that is not among the allowed ones."""
    if given not in allowed:
        raise ValueError(f"{name}={given!r} must be one of {', '.join(map(repr, allowed))}.")


def check_finite(**numbers: float) -> None:
    """Refuses NaN and infinity, by name."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name}={number} must be a finite number.")


def check_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors of different shapes: broadcasting would hide a missing dimension."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        raise ValueError("Shapes must be equal: " + ", ".join(f"{n} {list(t.shape)}" for n, t in tensors.items()) + ".")
