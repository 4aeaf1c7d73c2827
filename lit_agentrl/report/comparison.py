"""What a comparison found: every arm at the same spending, the paired differences, and what a level cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_agentrl.errors import UserError
from lit_agentrl.report.curves import Array, Curve, common_range, cost_of, mean_curve
from lit_agentrl.report.intervals import Estimate, estimate
from lit_agentrl.report.outcomes import RunOutcome, task_values

AXES = {
    "generated_tokens": "generated tokens",
    "tool_calls": "tool calls",
    "seconds": "seconds of training",
    "prefilled_tokens": "prefilled tokens",
}
INFORMATION = ("prefilled_tokens",)
"""Axes that are shown, but that no cap is on."""
OWN = ("trainer.default_root_dir", "seed_everything", "data.seed", "ckpt_path")
"""Options that differ between any two runs."""


@dataclass(slots=True)
class ArmResult:
    """One arm on one axis."""

    arm: str
    value: Estimate
    """The metric at the common budget, mean over seeds."""
    difference: Estimate | None
    """To the baseline, paired by seed and task; None for the baseline itself."""
    area: Estimate
    """The mean of the metric over the whole budget: the area under the curve, divided by the budget."""
    area_difference: Estimate | None
    cost_of_level: float | None
    """The budget at which the mean curve first reaches the level; None where it does not."""
    reached_by: int
    """Seeds whose own curve reaches the level."""


@dataclass(slots=True)
class AxisResult:
    """All arms at the same spending on one axis."""

    axis: str
    start: float
    budget: float
    """The largest that every run reached."""
    level: float
    """What `cost_of_level` asks for."""
    is_level_given: bool
    """Otherwise it is what the baseline had at the budget."""
    arms: list[ArmResult]
    curves: dict[str, list[Curve]]
    """By arm, a curve for each seed."""
    means: dict[str, Curve]


@dataclass(slots=True)
class Comparison:
    """All that the report says."""

    name: str
    metric: str
    baseline: str
    caps: dict[str, float]
    seeds: list[int]
    num_tasks: int
    is_paired_by_task: bool
    axes: list[AxisResult]
    costs: dict[str, dict[str, float]]
    """By arm: what a run had cost at its end, mean over seeds, iterations included."""
    differences: list[tuple[str, dict[str, Any]]]
    """Options that are not the same in all arms, with each arm's value."""
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        result = asdict(self)
        for axis, entry in zip(self.axes, result["axes"], strict=True):
            entry["curves"] = {arm: [_points(curve) for curve in curves] for arm, curves in axis.curves.items()}
            entry["means"] = {arm: _points(curve) for arm, curve in axis.means.items()}
        return result


def compare_runs(
    name: str, runs: Sequence[RunOutcome], metric: str, baseline: str, caps: dict[str, float], level: float | None
) -> Comparison:
    """Compare arms that have the same seeds, in the order of `runs`.

    Raises:
        UserError: Nothing was counted.
    """
    ordered = sorted(runs, key=lambda run: run.seed)
    values = task_values(ordered)
    arms = list(dict.fromkeys(run.arm for run in runs))
    seeds = sorted({run.seed for run in runs})
    notes = _notes(ordered, values, seeds)
    axes = []
    for axis in AXES:
        curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
        for run, of_run in zip(ordered, values, strict=True):
            curves[run.arm].append(_curve(run, of_run, axis))
        everything = [curve for of_arm in curves.values() for curve in of_arm]
        if min(len(curve.spent) for curve in everything) < 2:
            notes.append(f"{AXES[axis].capitalize()} were not counted in every run: this axis is left out.")
            continue
        axes.append(_axis(axis, curves, baseline, level))
    if not axes:
        raise UserError("No axis was counted in every run, so there is nothing that the arms have spent the same of.")
    for run in ordered:
        if all(run.budgets[-1][axis] < cap for axis, cap in caps.items()):
            notes.append(f"{run.arm} seed {run.seed} ended before it had spent its budget.")
    return Comparison(
        name, metric, baseline, caps, seeds, ordered[0].num_tasks, values[0].shape[1] > 1, axes,
        {arm: _costs([run for run in ordered if run.arm == arm]) for arm in arms},
        _option_differences({run.arm: run for run in reversed(ordered)}, arms), notes,
    )  # fmt: skip


def _notes(runs: list[RunOutcome], values: list[Array], seeds: list[int]) -> list[str]:
    notes = []
    if len(seeds) == 1:
        over = "tasks only" if values[0].shape[1] > 1 else "nothing, so there are none"
        notes.append(f"One seed: intervals are over {over}. Nothing is known about other seeds.")
    if values[0].shape[1] == 1:
        notes.append("Tasks could not be paired: intervals are over seeds only.")
    if len({run.num_tasks for run in runs}) > 1:
        notes.append("The runs were evaluated on different numbers of tasks: they are not comparable.")
    return notes


def _curve(run: RunOutcome, values: Array, axis: str) -> Curve:
    """The run's evaluations on an axis; of several at the same spending, the last."""
    spent = np.array([budget.get(axis, 0.0) for budget in run.budgets], dtype=np.float64)
    last = np.append(np.diff(spent) > 0, True)
    return Curve(spent[last], values[last])


def _axis(axis: str, curves: dict[str, list[Curve]], baseline: str, level: float | None) -> AxisResult:
    start, budget = common_range([curve for of_arm in curves.values() for curve in of_arm])
    means = {arm: mean_curve(of_arm) for arm, of_arm in curves.items()}
    at = {arm: np.array([curve.at(budget) for curve in of_arm]) for arm, of_arm in curves.items()}
    area = {arm: np.array([curve.average(start, budget) for curve in of_arm]) for arm, of_arm in curves.items()}
    wanted = float(at[baseline].mean()) if level is None else level
    arms = [
        ArmResult(
            arm,
            estimate(at[arm]),
            None if arm == baseline else estimate(at[arm] - at[baseline]),
            estimate(area[arm]),
            None if arm == baseline else estimate(area[arm] - area[baseline]),
            cost_of(means[arm].until(budget), wanted),
            sum(cost_of(curve.until(budget), wanted) is not None for curve in of_arm),
        )
        for arm, of_arm in curves.items()
    ]
    return AxisResult(axis, start, budget, wanted, level is not None, arms, curves, means)


def _costs(runs: list[RunOutcome]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for run in runs:
        for name, value in (run.budgets[-1] | {"iterations": run.iterations}).items():
            total[name] += value / len(runs)
    return dict(total)


def _option_differences(first: dict[str, RunOutcome], arms: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """What the saved configurations of each arm's first seed disagree in."""
    names = sorted({name for run in first.values() for name in run.config} - set(OWN))
    found = []
    for name in names:
        given = {arm: first[arm].config.get(name, "-") for arm in arms}
        if len({repr(value) for value in given.values()}) > 1:
            found.append((name, given))
    return found


def _points(curve: Curve) -> list[list[float]]:
    return [[float(spent), float(value)] for spent, value in zip(curve.spent, curve.means, strict=True)]
