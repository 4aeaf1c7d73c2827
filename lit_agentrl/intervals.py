"""95 % intervals of what an evaluation measures, over its tasks. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
NUM_RESAMPLES = 2000
MAX_PICKS = 1 << 20
"""Picks held at a time: a statistic of many tasks should not fill the memory."""


def wilson_interval(num_successes: float, num_trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); it stays inside [0, 1] and has a width at 0 and 1 too."""
    if num_trials == 0:
        return math.nan, math.nan
    share = num_successes / num_trials
    squared = Z_95**2 / num_trials
    center = (share + squared / 2) / (1 + squared)
    half_width = Z_95 * math.sqrt(share * (1 - share) / num_trials + squared / (4 * num_trials)) / (1 + squared)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def bootstrap_interval(
    values: Sequence[float], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of shares `values`, one per task, resampling tasks with a fixed seed.

    Where all tasks agree a resample never differs and the width would be 0: Wilson's interval over tasks stands in.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return math.nan, math.nan
    if np.all(array == array[0]):
        return wilson_interval(float(array.sum()), array.size)
    return bootstrap_statistic(
        lambda picks: array[picks].mean(axis=1), array.size, num_resamples=num_resamples, seed=seed
    )


def bootstrap_statistic(
    statistic: Callable[[Integers], Floats], num_tasks: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic, given as its values [R] for picks of tasks [R, tasks]."""
    generator = np.random.default_rng(seed)
    at_once = max(1, MAX_PICKS // num_tasks)
    sizes = [min(at_once, num_resamples - start) for start in range(0, num_resamples, at_once)]
    values = [statistic(generator.integers(0, num_tasks, (size, num_tasks))) for size in sizes]
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)
