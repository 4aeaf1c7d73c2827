"""The few collective operations the project needs, all of them no-ops in a single process."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_integers(values: list[int], how: str = "sum") -> list[int]:
    """Element-wise "sum" or "max" over ranks; every rank passes the same number of values."""
    if world()[1] == 1 or not values:
        return values
    return [int(value) for value in _reduce(torch.tensor(values, dtype=torch.int64), how)]


def reduce_floats(values: list[float], how: str = "sum") -> list[float]:
    """Element-wise "sum" or "max" over ranks, in float64."""
    if world()[1] == 1 or not values:
        return values
    return [float(value) for value in _reduce(torch.tensor(values, dtype=torch.float64), how)]


def gather(value: T) -> list[T]:
    """What every rank passed, in rank order."""
    size = world()[1]
    if size == 1:
        return [value]
    gathered: list[T | None] = [None] * size
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]  # every place was filled


def _reduce(values: torch.Tensor, how: str) -> torch.Tensor:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    values = values.to(device)
    dist.all_reduce(values, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return values.cpu()
