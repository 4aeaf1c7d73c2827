"""Whether a setting's step is the baseline's, and what to do where it is not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_agentrl.doctor.contract.facts import Facts
from lit_agentrl.doctor.contract.settings import Setting

Status = Literal["held", "violated", "failed", "skipped"]


@dataclass(frozen=True)
class Limits:
    """What two right steps may differ by, at most."""

    loss: float
    """Of the differentiated and of the logged loss: absolute up to a loss of 1, relative above."""
    one_minus_cosine: float
    norm: float
    largest: float


# Transformers computes norms in float32 even of float64 models, so that a shared token's gradient is rounded once where
# those of its copies are rounded each: 3e-8 of the largest entry. Everything else was below 1e-14.
LIMITS = {
    "float64": Limits(loss=1e-9, one_minus_cosine=1e-11, norm=1e-6, largest=1e-5),
    "float32": Limits(loss=1e-5, one_minus_cosine=1e-8, norm=1e-4, largest=1e-3),
    "half": Limits(loss=2e-2, one_minus_cosine=2e-2, norm=1e-1, largest=3e-1),
}
LOGGED = 1e-5
"""Metrics are summed in float32, whatever the model's precision."""
APART = 3.0
"""How many times as far as from the step in float32 two right steps of 16 bits may be from one another: both round, and
the rounding of one may be half as large again. Measured: up to 1.4 times in direction, 1.8 in the norm and 2.2 in the
largest entry (FSDP2 under bf16-mixed)."""
SAME = 1e-5
"""Relative difference of the sums over a row's advantages that is rounding: `batch_std` adds ranks up in their order.
"""


NONE = Limits(math.inf, math.inf, math.inf, math.inf)
"""Of a run that is there to be measured."""


@dataclass(frozen=True)
class Outcome:
    """Of one setting."""

    setting: Setting
    status: Status
    reason: str = ""
    """Why it was skipped or failed, or what is wrong."""
    facts: Facts | None = None
    has_same_rows: bool = False
    loss_difference: float | None = None
    logged_difference: float | None = None


def is_half(precision: str) -> bool:
    """Whether a run computes in 16 bits."""
    return precision not in LIMITS


def limits_for(precision: str, exact: Outcome | None = None) -> Limits:
    """By what a run computes in.

    Args:
        precision: Of the baseline.
        exact: The baseline's step in float32, where it could be made.
    """
    if not is_half(precision):
        return LIMITS[precision]
    found = exact.facts.difference if exact is not None and exact.facts is not None else None
    if exact is None or exact.status != "held" or found is None or exact.loss_difference is None:
        return LIMITS["half"]
    distance = math.sqrt(2 * found.one_minus_cosine)  # of the two gradients, brought to the same norm; relative to it
    return _between(
        LIMITS["float32"],
        Limits(
            loss=APART * max(exact.loss_difference, distance / 8),
            one_minus_cosine=APART**2 * found.one_minus_cosine,
            norm=APART * max(found.norm, distance / 4),
            largest=APART * found.largest,
        ),
        LIMITS["half"],
    )


def _between(least: Limits, limits: Limits, most: Limits) -> Limits:
    """NaN becomes the most."""
    pairs = zip(*map(dataclasses.astuple, (least, limits, most)), strict=True)
    return Limits(*(min(max(low, value), high) if value == value else high for low, value, high in pairs))


def judge(setting: Setting, facts: Facts, baseline: Facts, limits: Limits | None = None) -> Outcome:
    """Compare one run with the baseline.

    Args:
        setting: What was run.
        facts: What it found.
        baseline: What the first run found.
        limits: What they may differ by; None for those of the baseline's precision.
    """
    limits = limits or limits_for(baseline.precision)
    loss = _apart(facts.loss, baseline.loss)
    logged = None
    if facts.logged is not None and baseline.logged is not None:
        logged = _apart(facts.logged, baseline.logged)
    same = has_same_rows(facts, baseline)
    wrong = [] if same else [_other_rows(facts, baseline)]
    wrong += _beyond(facts, limits, loss, logged)
    status: Status = "violated" if wrong else "held"
    reason = "; ".join(wrong)
    if untried := _untried(setting, facts, baseline):
        status, reason = ("failed" if setting.ranks != facts.ranks else status), "; ".join([*wrong, untried])
        if status == "held" and setting.num_changes == 1:
            status = "skipped"
    return Outcome(setting, status, reason, facts, same, loss, logged)


def has_same_rows(facts: Facts, baseline: Facts) -> bool:
    """The same tokens and masks, denominators, advantages and old log-probabilities, whichever rank had them."""
    if [unit[0] for unit in facts.units] != [unit[0] for unit in baseline.units]:
        return False
    pairs = zip(facts.units, baseline.units, strict=True)
    return all(
        abs(a - b) <= SAME * max(1.0, abs(b)) for one, other in pairs for a, b in zip(one[1:], other[1:], strict=True)
    )


def _apart(value: float, expected: float) -> float:
    return abs(value - expected) / max(1.0, abs(expected))


def _beyond(facts: Facts, limits: Limits, loss: float, logged: float | None) -> list[str]:
    found = facts.difference
    assert found is not None
    checks = [
        ("the loss", loss, limits.loss),
        ("the logged loss", logged or 0.0, max(limits.loss, LOGGED)),
        ("the gradient's direction (1 - cosine)", found.one_minus_cosine, limits.one_minus_cosine),
        ("its norm", found.norm, limits.norm),
        (f"its largest entry ({found.weight})", found.largest, limits.largest),
    ]
    return [f"{name} is off by {value:.1e} (limit {limit:.0e})" for name, value, limit in checks if not value <= limit]


def _other_rows(facts: Facts, baseline: Facts) -> str:
    ours, theirs = ([unit[0] for unit in f.units] for f in (facts, baseline))
    if ours != theirs:
        return f"other rows or denominators are trained ({len(ours)} for {len(theirs)})"
    return "the same rows have other advantages or old log-probabilities"


def _untried(setting: Setting, facts: Facts, baseline: Facts) -> str:
    """What of the setting did not come about, so that the run shows nothing of it; empty where all did."""
    if facts.ranks != setting.ranks:
        return f"ran on {facts.ranks} ranks, not on {setting.ranks}"
    if setting.strategy == "fsdp2" and not facts.is_sharded:
        return "nothing was sharded"
    if setting.is_shared and not facts.shares:
        return f"this model shares no prefixes: {facts.refusal}"
    if setting.is_split and setting.num_changes == 1 and facts.micro_batches <= baseline.micro_batches:
        return f"{facts.num_rows} rows gave no more micro-batches: raise --num_prompts, or set data.max_tokens"
    return ""


def hint(outcome: Outcome, outcomes: Sequence[Outcome]) -> str:
    """What to look at, and what to set until it is mended; the simplest violated setting says most."""
    setting = outcome.setting
    simpler = [
        other.setting.name
        for other in outcomes
        if other.status == "violated" and other.setting != setting and _is_part(other.setting, setting)
    ]
    if simpler:
        return f"begin with `{simpler[0]}`, which is a part of it"
    if not outcome.has_same_rows and setting.ranks > 1:
        return (
            "advantages, or which rows are trained, depend on what one rank holds: compare within groups, or gather "
            "from all ranks (`distributed.gather`) first"
        )
    if not outcome.has_same_rows:
        return "what is trained on is not a function of prompt and seed: look at rewards, `advantages`, `trains_on`"
    if setting.num_changes > 1:
        return "each of its parts held alone, so it is their combination: leave one out"
    if setting.is_split:
        return (
            "the loss is a mean over a micro-batch: divide its sum by `batch.token_denominator` (`row_denominator`), "
            "which count the whole optimiser step, and return `self.scaled(loss)`"
        )
    if setting.is_shared:
        return "siblings see one another, or positions are off: set model.share_prefix false, run the doctor without it"
    if setting.is_recomputed:
        return "the forward is not the same twice (dropout, a counter, a cache): set model.gradient_checkpointing false"
    if setting.is_as_configured:
        return "what this configuration adds to the plain forward changes it (compile?): switch it off"
    if setting.ranks > 1:
        return (
            "the loss depends on the rank or on how many there are: divide by the batch's global denominators, return "
            "`self.scaled(loss)`, and let no rank leave a weight without its share"
        )
    return f"the strategy alone changes it: train with trainer.strategy {'ddp' if setting.strategy == 'fsdp2' else 1}"


def _is_part(one: Setting, other: Setting) -> bool:
    """Whether all that `one` changes is changed by `other` too."""
    ranks = one.strategy == "single" or (one.strategy == other.strategy and one.ranks <= other.ranks)
    flags = ("is_split", "is_shared", "is_recomputed", "is_as_configured")
    return ranks and all(getattr(other, flag) or not getattr(one, flag) for flag in flags)
