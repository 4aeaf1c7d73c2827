"""Time and memory of the update's passes, padded against shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from torch import nn

from lit_agentrl.doctor.memory import peak_bytes
from lit_agentrl.doctor.passes import Passes, Plan
from lit_agentrl.doctor.rows import packed_plan, padded_plan, reuse_of, select
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel


@dataclass(frozen=True)
class SideCost:
    """Forward, loss and backward of all rows one way."""

    seconds: list[float]
    """One figure per repeat; fewer than were asked for where the time was over."""
    peak_bytes: int
    """Of tensors, above what lived before (weights)."""
    budget: int
    """Tokens a micro-batch could hold: padded or unique ones."""
    num_micro_batches: int
    largest: int
    """Tokens, of the same kind, in the largest micro-batch there was."""

    @property
    def median_seconds(self) -> float:
        """Over the repeats."""
        return median(self.seconds)

    @property
    def bytes_per_token(self) -> float:
        """Peak memory per token of the largest micro-batch."""
        return self.peak_bytes / self.largest


@dataclass(frozen=True)
class Cost:
    """What the passes take."""

    padded: SideCost
    grouped: SideCost | None
    """None where the model takes the padded path anyway."""
    tried: dict[int, float]
    """Seconds of one padded pass by the budget of its micro-batches; the fastest was taken."""

    @property
    def speedup(self) -> float | None:
        """Padded seconds per shared second, medians."""
        return None if self.grouped is None else self.padded.median_seconds / self.grouped.median_seconds

    @property
    def memory_ratio(self) -> float | None:
        """Padded bytes per shared byte, at the peaks."""
        return None if self.grouped is None else self.padded.peak_bytes / max(1, self.grouped.peak_bytes)


def measure_cost(
    passes: Passes, padded: PaddedModel, grouped: PrefixGroupedModel | None, max_tokens: int, repeats: int
) -> Cost:
    """One round to warm up and to find the padded forward's best micro-batch, then repeats in turns, then memory.

    Args:
        passes: The rows.
        padded: The plain forward.
        grouped: The shared one; None where the model refuses it.
        max_tokens: Budget of a micro-batch.
        repeats: Timings of each side; fewer after the deadline, one at least.
    """
    tried: dict[int, float] = {}
    for budget, plan in padded_plans(passes, max_tokens).items():
        if not (tried and passes.is_late):
            tried[budget] = passes.seconds(padded, plan)
    best = min(tried, key=lambda budget: tried[budget])
    sides: list[tuple[nn.Module, Plan]] = [(padded, padded_plan(passes.rows, best))]
    if grouped is not None:
        sides.append((grouped, packed_plan(passes.rows, max_tokens)))
        passes.seconds(*sides[1])
    seconds: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats):
        if repeat and passes.is_late:
            break
        turns = range(len(sides)) if repeat % 2 == 0 else reversed(range(len(sides)))  # neither is always second
        for side in turns:
            seconds[side].append(passes.seconds(*sides[side]))
    peaks = [peak_bytes(_pass(passes, *side), passes.device) for side in sides]
    largest = [_largest(passes, sides[0][1], shared=False)]
    largest += [_largest(passes, plan, shared=True) for _, plan in sides[1:]]
    costs = [
        SideCost(seconds[i], peaks[i], (best, max_tokens)[i], len(sides[i][1]), largest[i]) for i in range(len(sides))
    ]
    return Cost(costs[0], costs[1] if grouped is not None else None, tried)


def padded_plans(passes: Passes, max_tokens: int) -> dict[int, Plan]:
    """Micro-batches by the budgets worth trying: what `max_tokens` allows, half and a quarter of it, one row."""
    longest = int(passes.rows.lengths.max())
    whole = max(longest, min(max_tokens, longest * len(passes.rows.lengths)))
    plans: dict[int, Plan] = {}
    for budget in (whole, whole // 2, whole // 4, longest):
        plan = padded_plan(passes.rows, max(budget, longest))
        if plan not in plans.values():
            plans[max(budget, longest)] = plan
    return plans


def _pass(passes: Passes, policy: nn.Module, plan: Plan) -> Callable[[], None]:
    return lambda: passes.run(policy, plan)


def _largest(passes: Passes, plan: Plan, *, shared: bool) -> int:
    counts = [reuse_of([select(passes.rows, indices)]) for indices in plan]
    return max(count.unique_tokens if shared else count.padded_tokens for count in counts)
