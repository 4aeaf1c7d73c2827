"""How far ratios are from 1 by numerics alone, at learning rate 0: sampler against trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_agentrl.doctor.passes import Passes, Plan
from lit_agentrl.doctor.rows import padded_plan
from lit_agentrl.doctor.twin import dtype_of, twin_of
from lit_agentrl.losses import sequence_mean, surrogate_metrics
from lit_agentrl.methods.base import PolicyModule
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.models.scoring import PaddedModel

MAX_OUTSIDE = 1e-3
"""Share of action tokens that numerics alone may put outside the clip band: clipping is for what updates moved."""
MAX_KL = 1e-3
"""Nats per token; an update moves the policy by some 1e-2."""


@dataclass(frozen=True)
class Ratios:
    """exp(new - old) over the action tokens of a policy that did not change."""

    compared: str
    micro_batch: str
    max_error: float
    """Largest |ratio - 1|."""
    num_outside: int
    """Action tokens outside the clip band."""
    num_tokens: int
    approx_kl: float
    """Mean of r - 1 - log r, nats per token."""

    @property
    def outside(self) -> float:
        """Share of the action tokens outside the clip band."""
        return self.num_outside / self.num_tokens

    @property
    def is_healthy(self) -> bool:
        """Within the limits; NaN is not."""
        return self.outside <= MAX_OUTSIDE and self.approx_kl <= MAX_KL and self.max_error == self.max_error


@dataclass(frozen=True)
class Noise:
    """The noise floor of the ratio."""

    configured: str
    """The precision of the run."""
    old_logprobs: str
    """What the run takes as the old policy's: "sampler" or "recompute"."""
    clip: tuple[float, float]
    """The band [1 - low, 1 + high] that counts as not clipped."""
    is_per_row: bool
    """Whether the ratio is a row's (GSPO) and not a token's."""
    sampler: dict[str, list[Ratios]]
    """The trainer in each precision against the sampler's log-probabilities: micro-batches of `max_tokens`, one row."""
    itself: Ratios
    """The trainer as configured against itself, rows together and alone: what micro-batches change."""
    again: Ratios
    """The trainer's training forward against its own forward before the update: what is left with `recompute`."""

    @property
    def trained(self) -> Ratios:
        """What this configuration trains with."""
        return self.again if self.old_logprobs == "recompute" else self.sampler[self.configured][0]

    @property
    def is_healthy(self) -> bool:
        """Whether what it trains with is within the limits."""
        return self.trained.is_healthy


@dataclass(frozen=True)
class Band:
    """What a module compares, and when it clips."""

    low: float = 0.2
    high: float = 0.2
    is_per_row: bool = False

    @classmethod
    def of(cls, module: LanguageModule) -> Band:
        """The module's own; PPO's usual one where it has none."""
        if not isinstance(module, PolicyModule):
            return cls()
        return cls(module.clip_low, module.clip_high, module.loss in ("gspo", "gspo_token"))

    def ratios(self, compared: str, micro_batch: str, logp: Tensor, old: Tensor, mask: Tensor) -> Ratios:
        """Of log-probabilities [B, L] on the mask."""
        logp, old = logp.double(), old.double()
        if self.is_per_row:
            logp, old = sequence_mean(logp, mask), sequence_mean(old, mask)
        sums = surrogate_metrics(logp, old, mask, self.low, self.high)
        return Ratios(
            compared=compared,
            micro_batch=micro_batch,
            max_error=float(torch.expm1(logp - old)[mask].abs().max()),
            num_outside=int(sums["clip_fraction"]),
            num_tokens=int(sums["num_tokens"]),
            approx_kl=float(sums["approx_kl"] / sums["num_tokens"]),
        )


def measure_noise(passes: Passes, policy: PaddedModel, together: Plan, max_tokens: int, precision: str) -> Noise:
    """The sampler's log-probabilities against the trainer's as configured, in bfloat16 and in float32.

    Args:
        passes: The rows, as they were sampled.
        policy: The module's own, as it trains.
        together: The module's own micro-batches.
        max_tokens: Their budget.
        precision: What the run computes in.
    """
    rows, module, band = passes.rows, passes.module, Band.of(passes.module)
    sampler = rows.old_logprobs if rows.sampler_logprobs is None else rows.sampler_logprobs
    alone = [[index] for index in range(len(rows.lengths))]
    single = PaddedModel(policy.lm, check=False)  # one row has nothing to share
    both = passes.logprobs(policy, together), passes.logprobs(single, alone)
    training = passes.logprobs(policy, together, grad=True)
    found = {precision: _against(sampler, *both, precision, band, rows.action_mask)}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        twin = None if name == precision else twin_of(policy.lm, dtype)
        if twin is not None:
            plans = padded_plan(rows, max_tokens), alone
            scored = [passes.logprobs(twin, plan, autocast=False) for plan in plans]
            found[name] = _against(sampler, scored[0], scored[1], name, band, rows.action_mask)
    return Noise(
        configured=precision,
        old_logprobs="recompute" if isinstance(module, PolicyModule) and module.recomputes(rows) else "sampler",
        clip=(band.low, band.high),
        is_per_row=band.is_per_row,
        sampler=found,
        itself=band.ratios(f"{precision} with itself", "one row : all", both[1], both[0], rows.action_mask),
        again=band.ratios(f"{precision} recomputed", "together", training, both[0], rows.action_mask),
    )


def precision_name(passes: Passes, policy: PaddedModel) -> str:
    """What training computes in: "float32", say, or "float32 under bfloat16 autocast"."""
    weights = str(dtype_of(policy)).removeprefix("torch.")
    with passes.precision():
        if not torch.is_autocast_enabled(passes.device.type):
            return weights
        autocast = str(torch.get_autocast_dtype(passes.device.type)).removeprefix("torch.")
    return f"{weights} under {autocast} autocast"


def _against(
    sampler: Tensor, together: Tensor, alone: Tensor, precision: str, band: Band, mask: Tensor
) -> list[Ratios]:
    """The sampler against the trainer, rows together and one at a time."""
    return [
        band.ratios(precision, "together", together, sampler, mask),
        band.ratios(precision, "one row", alone, sampler, mask),
    ]
