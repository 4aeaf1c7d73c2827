"""Statistics over groups of rows as segment sums in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from lit_agentrl._checks import check_choice

if TYPE_CHECKING:
    from torch import Tensor

Scale = Literal["std", "none", "batch_std"]
Singleton = Literal["zero", "raw"]


def normalise(
    x: Tensor,
    index: Tensor,
    num_groups: int,
    scale: Scale,
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Singleton = "zero",
    weights: Tensor | None = None,
) -> Tensor:
    """`standardize` on float64 and compact ids; `weights` sum to 1 over each sampled unit (a row, or a trajectory)."""
    check_choice("scale", scale, ("std", "none", "batch_std"))
    check_choice("singleton", singleton, ("zero", "raw"))
    if ddof not in (0, 1) or not 0 <= eps < math.inf:
        raise ValueError(f"ddof={ddof} must be 0 or 1, and eps={eps} finite, 0 or more.")
    order = x.argsort()  # sums in ascending order have the same bits whatever the order of the rows
    x, index = x[order], index[order]
    weights = torch.ones_like(x) if weights is None else weights[order]
    zeros = x.new_zeros(num_groups)
    units = zeros.index_add(0, index, weights).round()  # thirds of a trajectory sum to 1 only up to rounding
    deviation = x - (zeros.index_add(0, index, weights * x) / units)[index]
    result = deviation
    if scale == "std":
        squares = zeros.index_add(0, index, weights * deviation.square())
        result = deviation / ((squares / (units - ddof).clamp(min=1)).sqrt()[index] + eps)
    elif scale == "batch_std":
        total = units.sum()
        squares = (weights * (x - (weights * x).sum() / total).square()).sum()
        result = deviation / ((squares / (total - ddof).clamp(min=1)).sqrt() + eps)
    lowest = zeros.scatter_reduce(0, index, x, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, x, "amax", include_self=False)
    alone = (units == 1)[index]
    result = torch.where(alone | (lowest == highest)[index], 0.0, result)
    if singleton == "raw":
        result = torch.where(alone, x, result)
    return torch.empty_like(result).index_copy_(0, order, result)


def compact(*ids: Tensor) -> tuple[Tensor, int]:
    """The rank of each row's tuple of ids among the distinct tuples in lexicographic order, [N], and their number."""
    distinct, index = torch.unique(ids[0], return_inverse=True)
    for extra in ids[1:]:
        values, rank = torch.unique(extra, return_inverse=True)
        distinct, index = torch.unique(index * len(values) + rank, return_inverse=True)
    return index, len(distinct)
