"""What a real training step takes, to hold against what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_agentrl.doctor.memory import peak_bytes
from lit_agentrl.doctor.passes import Passes
from lit_agentrl.doctor.plan_tracker import of_this_rank


def measured_step(passes: Passes, policy: nn.Module, indices: Sequence[int]) -> int:
    """Most bytes that weights and two optimiser steps on one micro-batch hold at once; the weights are put back.

    Of a sharded policy they are those of this rank, and every rank calls it. In the second step gradients and states
    are there before the pass, as when micro-batches add up.

    Args:
        passes: The rows, and the module that makes the optimiser.
        policy: Scores them.
        indices: Which rows.
    """
    trained = passes.trainable()
    kept = [weight.detach().to("cpu", copy=True) for weight in trained]
    passes.clear()
    made: list[torch.optim.Optimizer] = []

    def work() -> None:
        made.append(passes.module.optimizer(trained))
        for _ in range(2):
            passes.accumulate(policy, [indices])
            made[0].step()

    try:
        return weight_bytes(policy) + peak_bytes(work, passes.device)
    finally:
        passes.clear()
        with torch.no_grad():
            for weight, before in zip(trained, kept, strict=True):
                weight.copy_(before)


def weight_bytes(policy: nn.Module) -> int:
    """Of weights (of sharded ones the shards) and buffers, and of the scales of those in 4 bits; each storage once."""
    storages = [of_this_rank(tensor).untyped_storage() for tensor in _tensors(policy)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(policy: nn.Module) -> Iterator[Tensor]:
    yield from policy.parameters()
    yield from policy.buffers()
    for weight in policy.parameters():
        yield from _state_tensors(getattr(weight, "quant_state", None))  # bitsandbytes'


def _state_tensors(state: Any) -> Iterator[Tensor]:
    if state is None:
        return
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
    yield from _state_tensors(getattr(state, "state2", None))
