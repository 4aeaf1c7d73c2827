"""The few collective operations the project needs, all of them no-ops in a single process.

Ranks that hold one copy of the weights together (tensor parallelism) are a team: they train on the same rows and say
the same, so what is reduced or gathered here counts each team once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_team: dist.ProcessGroup | None = None


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def set_team(group: dist.ProcessGroup | None) -> None:
    """Say which ranks form a team with this one, consecutive ones; None: every rank is one of its own."""
    global _team
    _team = group


def team_size() -> int:
    """Ranks of a team."""
    return 1 if _team is None else dist.get_world_size(_team)


def share() -> tuple[int, int]:
    """Which share of the data is this rank's, and how many there are: one a team."""
    rank, size = world()
    return rank // team_size(), size // team_size()


def is_leader() -> bool:
    """Whether this rank speaks for its team."""
    return world()[0] % team_size() == 0


def from_leader(make: Callable[[], T]) -> T:
    """What `make` gives on the team's first rank; the others wait for it.

    Raises:
        RuntimeError: `make` failed there; that rank itself raises what it was.
    """
    if team_size() == 1:
        return make()
    sent: list[tuple[bool, T | str]] = [(False, "it never answered")]
    error: Exception | None = None
    if is_leader():
        try:
            sent = [(True, make())]
        except Exception as raised:
            error, sent = raised, [(False, str(raised))]
    dist.broadcast_object_list(sent, group=_team, group_src=0)
    if error is not None:
        raise error
    is_made, value = sent[0]
    if not is_made:
        raise RuntimeError(f"The first rank of this team failed: {value}")
    return value  # type: ignore[return-value]  # a string only where it failed


def reduce_integers(values: list[int], how: str = "sum") -> list[int]:
    """Element-wise "sum" or "max" over teams; every rank passes the same number of values."""
    if world()[1] == 1 or not values:
        return values
    return [int(value) for value in _reduce(torch.tensor(values, dtype=torch.int64), how)]


def reduce_floats(values: list[float], how: str = "sum", *, every_rank: bool = False) -> list[float]:
    """Element-wise "sum" or "max" over teams, in float64; `every_rank` counts each rank of a team."""
    if world()[1] == 1 or not values:
        return values
    return [float(value) for value in _reduce(torch.tensor(values, dtype=torch.float64), how, every_rank)]


def gather(value: T) -> list[T]:
    """What every team passed, in the order of `share`."""
    size = world()[1]
    if size == 1:
        return [value]
    gathered: list[T | None] = [None] * size
    dist.all_gather_object(gathered, value)
    return gathered[:: team_size()]  # type: ignore[return-value]  # every place was filled


def _reduce(values: torch.Tensor, how: str, every_rank: bool = False) -> torch.Tensor:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    values = values.to(device)
    if how == "sum" and not every_rank and not is_leader():
        values.zero_()
    dist.all_reduce(values, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return values.cpu()
