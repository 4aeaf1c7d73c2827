"""One rank of FSDP2 beside ranks that are not there.

The rank shards, gathers and reduces by FSDP2's own code, on a process group that says "done" and sends nothing. On
tensors that hold nothing its buffers are counted like everything else: no formula says when a layer is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_agentrl.doctor.plan_policy import fake_mode
from lit_agentrl.errors import UserError
from lit_agentrl.models.sharding import Sharding, shard

if TYPE_CHECKING:
    from lit_agentrl.models.scoring import PaddedModel


@dataclass(frozen=True)
class Ranks:
    """How a run is spread.

    Args:
        sharded: Ranks that FSDP2 shards weights, gradients and optimiser states over; 1 does not shard.
        cpu_offload: Whether they lie in the CPU's memory.
        reshard_after_forward: As the strategy has it.
    """

    sharded: int = 1
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether one device holds everything."""
        return self.sharded == 1 and not self.cpu_offload


@contextmanager
def one_of(policy: PaddedModel, ranks: Ranks, precision: str) -> Iterator[None]:
    """Make a policy that holds nothing one rank's; it can be run while this is entered.

    Where the shards lie is not looked at: here all is the CPU's memory.

    Args:
        policy: Filled by `plan_policy.fill`.
        ranks: How many there are.
        precision: The trainer's.

    Raises:
        UserError: In a process that has ranks already, and for models that cannot be sharded.
    """
    with _pretended(ranks.sharded) as mesh:
        with fake_mode(policy.lm), warnings.catch_warnings():
            # copying a model's structure asks every weight for its address
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            shard(policy, mesh, Sharding(reshard_after_forward=ranks.reshard_after_forward), precision)
        yield


@contextmanager
def _pretended(size: int) -> Iterator[DeviceMesh]:
    """Be the first of `size` ranks, of which the others are not there."""
    if dist.is_initialized():
        raise UserError("FSDP2 is planned for outside of a run on several ranks: start one process.")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()
