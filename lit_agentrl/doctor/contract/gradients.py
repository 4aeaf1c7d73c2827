"""Whole gradients on the disk, one file a weight, and how far another run's are from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from lit_agentrl import distributed
from lit_agentrl.doctor.contract.facts import Difference
from lit_agentrl.errors import UserError
from lit_agentrl.models.shards import gathered

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

FOLDER = "gradient"


def save(module: LightningModule, folder: Path) -> float:
    """Write the gradient of every trainable weight, and give its norm.

    Raises:
        UserError: The disk has no room for it.
    """
    target = folder / FOLDER
    target.mkdir()
    needed = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"The gradient takes {needed / 2**30:.1f} GiB, {target} has {free / 2**30:.1f} GiB left: set TMPDIR to a "
            "larger disk, or train an adapter (--model.lora)."
        )
    squares = torch.zeros((), dtype=torch.float64)
    for number, (_, gradient) in enumerate(_gradients(module)):
        save_file({"gradient": gradient.contiguous()}, target / f"{number}.safetensors")
        squares += gradient.double().square().sum()
    return float(squares.sqrt())


def compare(module: LightningModule, baseline: Path) -> tuple[float, Difference | None]:
    """The norm of the gradient, and its difference from the one that `save` wrote; on rank 0, nothing elsewhere.

    Gathers what is sharded, so every rank has to call it.
    """
    dot, squares, largest, far, weight = 0.0, [0.0, 0.0], 0.0, 0.0, ""
    for number, (name, gradient) in enumerate(_gradients(module)):
        if distributed.world()[0]:
            continue
        ours = gradient.double()
        theirs = load_file(baseline / FOLDER / f"{number}.safetensors")["gradient"].double()
        dot += float((ours * theirs).sum())
        squares = [squares[0] + float(theirs.square().sum()), squares[1] + float(ours.square().sum())]
        largest = max(largest, float(theirs.abs().max()))
        distance = float((ours - theirs).abs().max())
        if not distance <= far:  # NaN too
            far, weight = distance, name
    if distributed.world()[0]:
        return 0.0, None
    norms = [value**0.5 for value in squares]
    if not norms[0]:
        return norms[1], Difference(float(norms[1] > 0), norms[1], far, weight)
    apart = 1.0 - dot / (norms[0] * norms[1]) if norms[1] else 1.0
    apart = 0.0 if apart < 0 else apart  # by rounding; NaN stays
    return norms[1], Difference(apart, abs(norms[1] - norms[0]) / norms[0], far / largest, weight)


def _gradients(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Whole, on the CPU; zeros where none arrived."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            yield name, torch.zeros(parameter.shape, dtype=parameter.dtype)
        else:
            yield name, gathered(parameter.grad).detach().cpu()
