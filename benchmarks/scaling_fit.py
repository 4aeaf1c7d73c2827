"""The parameters of `scaling_model.py`, fitted to `scaling_points.py`: few, non-negative, in relative error.

An update takes max(host, GPU): the host launches a layer's kernels for every micro-batch, while the GPU computes

    matrices / (e x peak) + scores / (a x peak) + c x tokens x layers x width + optimiser's bytes / HBM,

e and a of flash kernels being assumed (one size of model cannot tell them from c), a of FlexAttention fitted, c what
the rest of a layer takes for each number that it writes. Decoding takes max(host, GPU) a token too.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scaling_points import MEMORIES, ROLLOUTS, UPDATES, Memory, Rollout, Update
from scaling_shapes import MEASURED, Shape

PEAK = 989e12
"""FLOP/s of an H100 SXM in dense bfloat16, by its data sheet."""
HBM = 3.35e12
"""Bytes/s of the same, by its data sheet."""
MATRICES = 0.70
"""Share of the peak that matrix products reach: assumed."""
FLASH = 0.50
"""Share of the peak that flash kernels reach, forward and backward: assumed (a fit would put it above 0.9)."""
GIB = 2**30
Matrix = NDArray[np.floating[Any]]
WEIGHTS = MEASURED.num_weights


@dataclass(frozen=True)
class Fit:
    """What the measurements say."""

    launch: float
    """Seconds of the host a layer and micro-batch, forward and backward."""
    rest: float
    """Seconds of the GPU a token, layer and number of `Shape.width`, forward and backward."""
    flex: float
    """Share of the peak that FlexAttention reaches."""
    decode: float
    """Seconds of the host a layer and decoded token of `HFEngine`, for the whole batch at once."""
    collect: float
    """Seconds of a collection beside decoding."""
    stored: float
    """Bytes kept for the backward a token, layer and number of `Shape.width`."""

    def gpu_seconds(
        self, shape: Shape, flops: tuple[float, float], tokens: float, attention: Literal["flash", "flex"]
    ) -> float:
        """Of forward and backward."""
        matrices, scores = flops
        rest = self.rest * tokens * shape.num_hidden_layers * shape.width
        reached = FLASH if attention == "flash" else self.flex
        return matrices / (MATRICES * PEAK) + scores / (reached * PEAK) + rest

    def host_seconds(self, shape: Shape, micro_batches: float) -> float:
        """Of forward and backward."""
        return self.launch * shape.num_hidden_layers * micro_batches

    def update(self, point: Update) -> float:
        """Predicted seconds of a measured one."""
        gpu = self.gpu_seconds(MEASURED, point.flops, point.tokens, point.attention) + optimizer_seconds(point)
        return max(self.host_seconds(MEASURED, point.micro_batches), gpu)

    def rollout(self, point: Rollout) -> float:
        """Predicted seconds of a measured one; at 0.6 billion weights the host decides."""
        decoding = self.decode * MEASURED.num_hidden_layers * point.steps
        return decoding + (self.collect if point.collects else 0.0)

    def memory(self, point: Memory) -> float:
        """Predicted GiB of a measured one: gradients, and what is kept for the backward."""
        kept = self.stored * MEASURED.num_hidden_layers * MEASURED.width * point.tokens
        return (2 * WEIGHTS + kept) / GIB


def optimizer_seconds(point: Update) -> float:
    """AdamW on 16-bit states reads 4 and writes 3 numbers a weight; the norm and the clipping 3 more."""
    return 10 * 2 * WEIGHTS / HBM if point.has_optimizer else 0.0


def is_gpu_bound(point: Update) -> bool:
    """Whether the GPU decided: with fewer tokens than these the notes of the measurements say that the host did."""
    return point.tokens > 8_000


def non_negative(rows: Matrix, targets: Matrix) -> Matrix:
    """Least squares without negative coefficients [K]: the best of all subsets of columns that need none."""
    best, least = np.zeros(rows.shape[1]), float(targets @ targets)
    for count in range(1, rows.shape[1] + 1):
        for columns in itertools.combinations(range(rows.shape[1]), count):
            found = np.linalg.lstsq(rows[:, columns], targets, rcond=None)[0]
            rest = targets - rows[:, columns] @ found
            if (found >= 0).all() and float(rest @ rest) < least:
                best, least = np.zeros(rows.shape[1]), float(rest @ rest)
                best[list(columns)] = found
    return best


def fit() -> Fit:
    """From all points but those that another code made."""
    busy = [point for point in UPDATES if is_gpu_bound(point)]
    rows, targets = [], []
    for point in busy:
        matrices, scores = point.flops
        is_flash = point.attention == "flash"
        known = matrices / (MATRICES * PEAK) + is_flash * scores / (FLASH * PEAK) + optimizer_seconds(point)
        numbers = point.tokens * MEASURED.num_hidden_layers * MEASURED.width
        rows.append([numbers / point.seconds, 0.0 if is_flash else scores / PEAK / point.seconds])
        targets.append((point.seconds - known) / point.seconds)
    scale = np.array([1e-11, 1.0])
    found = non_negative(np.array(rows) * scale, np.array(targets))
    rest, flex = found * scale
    layers = MEASURED.num_hidden_layers
    idle = [point for point in UPDATES if not is_gpu_bound(point)]
    launch = statistics.median(point.seconds / point.micro_batches for point in idle) / layers
    alone = [point.seconds / point.steps / layers for point in ROLLOUTS if point.steps == 64]
    decode = statistics.mean(alone)
    collect = statistics.mean(p.seconds - decode * layers * p.steps for p in ROLLOUTS if p.collects)
    kept = [(p.gib * GIB - 2 * WEIGHTS) / (p.tokens * layers * MEASURED.width) for p in MEMORIES]
    return Fit(launch, float(rest), 1 / float(flex), decode, collect, statistics.mean(kept))
