"""A metric against what was spent: read off a budget, averaged over it, and what a level cost. Pure functions.

Between two evaluations a curve is a straight line. Taking the last evaluation at or below a budget instead would charge
a run for how far its evaluations happen to lie apart, and arms whose iterations cost more have them further apart.

Legend for shapes: N evaluations, T tasks (1 where only the mean is known).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class Curve:
    """The evaluations of one run on one axis of cost."""

    spent: Array
    """[N], strictly increasing."""
    values: Array
    """[N, T]."""

    @property
    def means(self) -> Array:
        """The metric of each evaluation, [N]."""
        means: Array = self.values.mean(axis=1)
        return means

    def at(self, budget: float) -> Array:
        """Every task's value at a budget between the first and the last evaluation, [T]."""
        after = int(np.clip(np.searchsorted(self.spent, budget), 1, len(self.spent) - 1))
        low, high = self.spent[after - 1], self.spent[after]
        share = (budget - low) / (high - low)
        value: Array = (1 - share) * self.values[after - 1] + share * self.values[after]
        return value

    def average(self, first: float, last: float) -> Array:
        """The area under every task's curve between two budgets, divided by their distance, [T]."""
        inside = (self.spent > first) & (self.spent < last)
        spent = np.concatenate([[first], self.spent[inside], [last]])
        values = np.concatenate([[self.at(first)], self.values[inside], [self.at(last)]])
        area: Array = ((values[1:] + values[:-1]) / 2 * np.diff(spent)[:, None]).sum(axis=0)
        return area / (last - first)

    def until(self, budget: float) -> Curve:
        """The part up to a budget, which is its last point."""
        inside = self.spent < budget
        return Curve(
            np.concatenate([self.spent[inside], [budget]]), np.concatenate([self.values[inside], [self.at(budget)]])
        )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over runs at every budget where one of them was evaluated and all have values, [N, 1]."""
    first, last = common_range(curves)
    every = np.unique(np.concatenate([curve.spent for curve in curves]))
    spent = every[(every >= first) & (every <= last)]
    return Curve(spent, np.array([[np.mean([curve.at(b).mean() for curve in curves])] for b in spent]))


def common_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """The smallest and the largest budget at which every run has a value."""
    return float(max(curve.spent[0] for curve in curves)), float(min(curve.spent[-1] for curve in curves))


def cost_of(curve: Curve, level: float) -> float | None:
    """The budget at which the curve's mean first reaches `level`; None where it never does."""
    means = curve.means
    reached = np.flatnonzero(means >= level - 1e-12)  # a mean of interpolated values may miss its own value by rounding
    if len(reached) == 0:
        return None
    place = int(reached[0])
    if place == 0:
        return float(curve.spent[0])
    low, high = means[place - 1], means[place]
    share = min(1.0, (level - low) / (high - low))
    return float(curve.spent[place - 1] + share * (curve.spent[place] - curve.spent[place - 1]))
