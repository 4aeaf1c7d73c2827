"""What a training step holds, counted on tensors without storage: the step runs, no number is computed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_agentrl.doctor.plan_policy import fake_mode
from lit_agentrl.doctor.plan_tracker import LiveBytes, of_this_rank
from lit_agentrl.models import offload
from lit_agentrl.models.offload import OffloadActivations
from lit_agentrl.models.scoring import PaddedModel
from lit_agentrl.models.sharding import layers_of
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.types import TrainBatch

Device = Literal["cpu", "cuda"]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SAMPLE = 2**18
"""Weights that an optimiser which does not run without storage is tried on."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepBytes:
    """The parts of a training step's memory."""

    trained: int
    """Weights that are trained."""
    frozen: int
    """Weights that are not, and buffers; those in 4 bits with their scales."""
    gradients: int
    optimizer: int
    """States of the optimiser."""
    activations: int
    """Most of what a forward and backward pass holds above weights, gradients and states: activations, gradients before
    they are added, parts of the logits."""
    update: int
    """Most of what the optimiser's step holds above them."""
    update_apart: int
    """The same where it takes one weight after another, as it does in the CPU's memory."""
    offloaded: int
    """Activations that `offload_activations` keeps in the CPU's memory."""
    unit: int
    """Weights that are trained of what FSDP2 gathers together, where there are most: a layer, or all that is outside of
    the layers."""
    pixels: int = 0
    """Of the micro-batch's images: they are on the device before the step, and not in `peak`."""

    @property
    def weights(self) -> int:
        """All of them."""
        return self.trained + self.frozen

    @property
    def resting(self) -> int:
        """What lives between two micro-batches."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Of a step on one device."""
        return self.resting + max(self.activations, self.update)


def count_step(
    policy: PaddedModel,
    batch: TrainBatch,
    make_optimizer: MakeOptimizer,
    *,
    autocast: torch.dtype | None = None,
    device: Device = "cpu",
    offloads: bool = False,
) -> StepBytes:
    """Run a step of `policy`, which holds nothing, on rows that are real, and count; of a sharded one a rank's part.

    Counted is a later micro-batch of a later step: gradients and states are there already.

    Args:
        policy: Filled by `plan_policy.fill`, then maybe sharded by `plan_ranks.one_of`.
        batch: One micro-batch, on the CPU.
        make_optimizer: Called with the trained weights.
        autocast: The type of automatic mixed precision.
        device: Where the step will run. On a GPU the optimiser updates all weights in one call each, and the head takes
            more of the vocabulary at a time: faster, and more memory.
        offloads: Whether activations are moved to the CPU's memory.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    with LiveBytes(fake_mode(policy.lm)) as count, _head_of(device):
        num_trained = count.hold(trained)
        frozen = count.hold([*policy.parameters(), *policy.buffers()])
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        gradients = count.live - num_trained - frozen
        optimizer, states, apart, update = _count_optimizer(count, make_optimizer, trained, foreach=device == "cuda")
        before = count.live
        moved = _Counted(policy.lm) if offloads else nullcontext()
        count.restart()
        with moved, torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            logp = policy(
                batch.token_ids,
                batch.lengths,
                targets=batch.action_mask,
                temperature=batch.temperature,
                entropy=True,
                vision=batch.vision,
            ).logprobs
            loss = -(batch.advantages * logp).sum() / batch.num_action_tokens
        loss.backward()
        activations = count.peak - before
        del optimizer  # until here: its states had to live
    return StepBytes(
        trained=num_trained,
        frozen=frozen,
        gradients=gradients,
        optimizer=states,
        activations=activations,
        update=update,
        update_apart=apart,
        offloaded=moved.total if isinstance(moved, _Counted) else 0,
        unit=_unit(policy),
        pixels=_pixels(batch),
    )


@contextmanager
def _head_of(device: Device) -> Iterator[None]:
    """Let the head visit the vocabulary in the chunks of another device."""
    file: Any = importlib.import_module("lit_agentrl.models.token_logprobs")  # its function hides it in the package
    kept = file.VOCAB_CHUNK
    if device == "cuda":
        file.VOCAB_CHUNK = max(kept, file.CUDA_LOGITS // file.TOKEN_CHUNK)
    try:
        yield
    finally:
        file.VOCAB_CHUNK = kept


class _Counted(OffloadActivations):
    """Offloading to nowhere: what is put away stops to count."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__(lm)
        self.total = 0

    def moves(self, tensor: Tensor) -> bool:
        return tensor.nbytes >= offload.SMALL and not self._is_weight(tensor)

    def out(self, tensor: Tensor) -> Any:
        self.total += tensor.nbytes
        return tensor.shape, tensor.stride(), tensor.dtype

    def back(self, away: Any) -> Tensor:
        shape, stride, dtype = away
        weight = of_this_rank(next(self._lm.parameters()))
        return weight.new_empty_strided(shape, stride, dtype=dtype)


def _count_optimizer(
    count: LiveBytes, make: MakeOptimizer, trained: list[nn.Parameter], *, foreach: bool
) -> tuple[object, int, int, int]:
    """What holds an optimiser's states, their bytes, and the most that a later step holds above them.

    That twice: weight by weight, and, where `foreach` says so and the optimiser can, with all weights in one call each.
    """
    before = count.live
    try:
        optimizer = make(trained)
        optimizer.step()
    except Exception as error:  # whatever kernels of other packages raise at tensors without storage
        log.debug("The optimiser does not run without storage: %s", error)
        return None, _sampled_optimizer(make, trained), 0, 0
    states = count.live - before
    apart = together = _step_bytes(count, optimizer)
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    if foreach:
        together = _step_bytes(count, optimizer)
    return optimizer, states, apart, together


def _step_bytes(count: LiveBytes, optimizer: torch.optim.Optimizer) -> int:
    """The most that a step holds above what lives before it."""
    count.restart()
    resting = count.live
    optimizer.step()
    return count.peak - resting


def _sampled_optimizer(make: MakeOptimizer, trained: list[nn.Parameter]) -> int:
    """Bytes of the states by those of a real tensor of `SAMPLE` weights: what is paged is not on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = nn.Parameter(torch.zeros(SAMPLE, dtype=trained[0].dtype, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    resident = sum(value.nbytes for value in states if not getattr(value, "is_paged", False))
    return round(resident / SAMPLE * sum(of_this_rank(p).numel() for p in trained))


def _pixels(batch: TrainBatch) -> int:
    if not isinstance(batch.vision, VisionInputs):
        return 0
    return sum(image.nbytes for images in batch.vision.pixels.values() for image in images)


def _unit(policy: PaddedModel) -> int:
    """The largest of the units that `sharding.shard` makes."""
    layers = layers_of(policy.lm)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    units = [list(layer.parameters()) for layer in layers]
    units.append([p for p in policy.parameters() if id(p) not in inside])
    return max(sum(p.nbytes for p in unit if p.requires_grad) for unit in units)
