"""Intervals over seeds and tasks: a bootstrap of both, made wide enough for a handful of seeds. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUM_DRAWS = 2000
LEVEL = 0.95


@dataclass(slots=True, frozen=True)
class Estimate:
    """A mean, and where it lies with 95 %."""

    value: float
    low: float | None = None
    """None where nothing varies that an interval could be made from."""
    high: float | None = None

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out 0; False without one."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(slots=True, frozen=True)
class Spread:
    """Bootstrap variances of the mean of an array [seeds, tasks]."""

    seeds: float
    """When seeds alone are drawn."""
    tasks: float
    """When tasks alone are drawn."""
    both: float
    """When both are, independently."""

    @property
    def variance(self) -> float:
        """Of the mean: the noise of single episodes is in each of the two, and counts once.

        How much that is, the draws of both tell: their variance is the sum of the two and the noise once more.
        """
        noise = max(0.0, self.both - self.seeds - self.tasks)
        return max(self.seeds + self.tasks - noise, self.seeds, self.tasks)


def estimate(values: Array, *, seed: int = 0) -> Estimate:
    """The mean of `values` [seeds, tasks] and its interval: mean +- t x standard error of a two-way bootstrap.

    A draw takes seeds and, independently, tasks with replacement; all seeds share the draw of tasks, since all are
    evaluated on the same ones (Owen 2007, "The pigeonhole bootstrap"). Each takes one fewer than there are, which makes
    the variance of a mean unbiased (Hesterberg 2015, arXiv 1411.5279). Percentiles of the draws would be the smallest
    and the largest of three seeds, which hold the truth 3 times in 4: instead t is Student's, with degrees of freedom
    between those of the seeds and those of the tasks, by which of them the variance comes from (Satterthwaite 1946).
    For normal seeds alone that is exact, however few they are.

    With one seed only tasks are drawn. A [n, 1] array has no tasks to draw.
    """
    num_seeds, num_tasks = values.shape
    mean = float(values.mean())
    spread = bootstrap(values, np.random.default_rng(seed))
    if spread.variance <= (1e-12 * max(1.0, abs(mean))) ** 2:  # rounding of equal numbers
        return Estimate(mean)
    parts = ((spread.seeds, num_seeds - 1), (spread.tasks, num_tasks - 1))
    degrees = spread.variance**2 / sum(variance**2 / freedom for variance, freedom in parts if freedom)
    half = t_quantile(max(1.0, round(degrees, 1))) * spread.variance**0.5
    return Estimate(mean, mean - half, mean + half)


def bootstrap(values: Array, generator: np.random.Generator, num_draws: int = NUM_DRAWS) -> Spread:
    """How the mean of `values` [seeds, tasks] varies when seeds, tasks or both are drawn anew."""
    num_seeds, num_tasks = values.shape
    seeds, tasks = _picks(num_seeds, num_draws, generator), _picks(num_tasks, num_draws, generator)
    of_seeds = values[seeds].mean(axis=1)
    of_both = np.take_along_axis(of_seeds, tasks, axis=1).mean(axis=1)
    of_tasks = values.mean(axis=0)[tasks].mean(axis=1)
    return Spread(float(of_seeds.mean(axis=1).var()), float(of_tasks.var()), float(of_both.var()))


def _picks(size: int, num_draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Which items each draw takes, [draws, size - 1]; the only one where there is one."""
    return generator.integers(0, size, (num_draws, max(1, size - 1)))


@cache
def t_quantile(degrees: float, level: float = LEVEL) -> float:
    """How many standard errors a two-sided interval of Student's t reaches.

    The distribution function is 1/2 + c x integral of cos^(degrees - 1) up to atan(t / sqrt(degrees)): smooth enough
    for trapezoids, and no library of special functions is needed.
    """
    angles = np.linspace(0.0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(level, area / area[-1], angles)  # two tails together hold 1 - level
    return float(np.tan(angle) * np.sqrt(degrees))
