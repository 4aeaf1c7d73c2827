"""Whether the shared-prefix forward computes what the padded one does, on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_agentrl.doctor.passes import Passes, Plan
from lit_agentrl.doctor.twin import exact_dtype, twin_of
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel


@dataclass(frozen=True)
class Limits:
    """What two right forwards may differ by."""

    logprob: float
    """Nats, any one token: the start-up check's own tolerance."""
    cosine: float
    """Least cosine of the two gradients."""
    norm: float
    """Relative difference of their norms."""


SINGLE = Limits(logprob=1e-3, cosine=0.999, norm=0.01)
HALF = Limits(logprob=0.2, cosine=0.95, norm=0.1)
"""In 16-bit floats."""
FURTHER, FLOOR = 3.0, 1e-6
"""Beside a more exact copy: how many times as far from it as the padded forward the shared one may be on average, and
the nats below which that means nothing. Right ones were 0.8 to 1.3 times as far."""


@dataclass(frozen=True)
class Distance:
    """Of two sets of log-probabilities, in nats, over the action tokens."""

    max: float
    mean: float


@dataclass(frozen=True)
class Equality:
    """The shared-prefix forward beside the padded one, and both beside a more exact copy of the model."""

    logprobs: Distance
    cosine: float
    """Of the two gradients over all trainable parameters."""
    norm_difference: float
    """|norm of one - norm of the other| / norm of the padded one's gradient."""
    limits: Limits
    exact: str
    """The precision of the copy, float64 or float32; empty where there was no memory or no time for one."""
    padded_rounding: Distance | None
    """The padded forward's distance from the copy."""
    grouped_rounding: Distance | None
    """The shared-prefix forward's distance from the copy."""

    @property
    def is_healthy(self) -> bool:
        """Within the limits; NaN is not."""
        return (
            self.logprobs.max <= self.allowed
            and self.cosine >= self.limits.cosine
            and self.norm_difference <= self.limits.norm
            and self.is_only_rounding
        )

    @property
    def allowed(self) -> float:
        """Nats that one token may differ by: the limit, or more where the padded forward itself is so far off."""
        rounding = 0.0 if self.padded_rounding is None else self.padded_rounding.max
        return max(self.limits.logprob, FURTHER * rounding)

    @property
    def is_only_rounding(self) -> bool:
        """Whether the shared forward is about as far from the exact copy as the padded one; True without a copy."""
        if self.padded_rounding is None or self.grouped_rounding is None:
            return True
        return self.grouped_rounding.mean <= max(FURTHER * self.padded_rounding.mean, FLOOR)


def measure_equality(
    passes: Passes, padded: PaddedModel, grouped: PrefixGroupedModel, plans: tuple[Plan, Plan], *, half: bool
) -> Equality:
    """Both forwards of the same rows, and both gradients of the same loss.

    Args:
        passes: The rows.
        padded: The plain forward.
        grouped: The shared one; it must not refuse the model.
        plans: Micro-batches of the one and of the other.
        half: Whether training computes in 16-bit floats.
    """
    mask = passes.rows.action_mask
    in_rows, in_tree = passes.logprobs(padded, plans[0]), passes.logprobs(grouped, plans[1])
    cosine, norm_difference = compare(passes.gradients(padded, plans[0]), passes.gradients(grouped, plans[1]))
    dtype = exact_dtype(padded.lm, half=half)
    twin = None if dtype is None else twin_of(padded.lm, dtype)
    exact = None if twin is None else passes.logprobs(twin, plans[0], autocast=False)
    return Equality(
        logprobs=distance(in_tree, in_rows, mask),
        cosine=cosine,
        norm_difference=norm_difference,
        limits=HALF if half else SINGLE,
        exact="" if twin is None else str(dtype).removeprefix("torch."),
        padded_rounding=None if exact is None else distance(in_rows, exact, mask),
        grouped_rounding=None if exact is None else distance(in_tree, exact, mask),
    )


def distance(one: Tensor, other: Tensor, mask: Tensor) -> Distance:
    """Between log-probabilities [B, L] on the mask."""
    difference = (one.double() - other.double()).abs()[mask]
    return Distance(float(difference.max()), float(difference.mean()))


def compare(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """Cosine of two gradients, and the difference of their norms relative to the first; in float64."""
    dot = torch.zeros((), dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(one, other, strict=True):
        a, b = a.flatten().double(), b.flatten().double()
        dot += (a @ b).cpu()
        squares += torch.stack([a @ a, b @ b]).cpu()
    norms = squares.sqrt()
    return float(dot / norms.prod()), float((norms[1] - norms[0]).abs() / norms[0])
