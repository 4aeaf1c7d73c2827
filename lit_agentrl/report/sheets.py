"""The tables and sentences of a comparison, before they become terminal, Markdown or HTML."""

from __future__ import annotations

from typing import Any

from lit_agentrl.callbacks.progress import duration
from lit_agentrl.report.comparison import AXES, INFORMATION, ArmResult, AxisResult, Comparison
from lit_agentrl.report.intervals import Estimate
from lit_agentrl.report.page import Sheet
from lit_agentrl.report.spec import SHARES

COSTS = {
    "iterations": "iterations",
    "generated_tokens": "generated tokens",
    "prefilled_tokens": "prefilled",
    "cached_tokens": "cached",
    "tool_calls": "tool calls",
    "env_steps": "environment steps",
    "replayed_steps": "replayed",
    "seconds": "training",
}


def sheets(comparison: Comparison) -> list[Sheet]:
    """One for each axis, what runs cost, and what differs between the arms."""
    return [*(_axis(axis, comparison) for axis in comparison.axes), _costs(comparison), _options(comparison)]


def introduction(comparison: Comparison) -> list[str]:
    """What was compared, and what to know before reading on."""
    caps = " or ".join(spending(name, cap) for name, cap in comparison.caps.items())
    seeds = ", ".join(map(str, comparison.seeds))
    paired = "seed and task" if comparison.is_paired_by_task else "seed"
    return [
        f"{comparison.metric} on {comparison.num_tasks} held-out tasks, baseline {comparison.baseline}, seeds {seeds}. "
        f"Every run trains until it has spent {caps}.",
        f"Brackets are 95 % intervals; differences are paired by {paired}. Values between two evaluations are on a "
        "straight line.",
        *comparison.notes,
    ]


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each arm and each axis that a cap can be on."""
    return [
        verdict(arm, axis, comparison)
        for axis in comparison.axes
        if axis.axis not in INFORMATION
        for arm in axis.arms
        if arm.difference is not None
    ]


def verdict(arm: ArmResult, axis: AxisResult, comparison: Comparison) -> str:
    """Whether the arm is better than the baseline at the same spending."""
    assert arm.difference is not None
    found = difference(arm.difference, comparison.metric)
    return (
        f"At {spending(axis.axis, axis.budget)} {arm.arm} minus {comparison.baseline} is {found}: "
        f"{_decision(arm.difference)}."
    )


def _decision(found: Estimate) -> str:
    if found.low is None:
        return "not decided, nothing varies that an interval could be made from"
    if not found.is_decided:
        return "not decided, the interval contains 0"
    return "higher" if found.value > 0 else "lower"


def _axis(axis: AxisResult, comparison: Comparison) -> Sheet:
    metric = comparison.metric
    level = number(axis.level, metric)
    rows = [
        [
            arm.arm,
            estimate_text(arm.value, metric),
            "baseline" if arm.difference is None else difference(arm.difference, metric),
            estimate_text(arm.area, metric),
            "baseline" if arm.area_difference is None else difference(arm.area_difference, metric),
            "not reached" if arm.cost_of_level is None else amount(axis.axis, arm.cost_of_level),
            f"{arm.reached_by} of {len(comparison.seeds)}",
        ]
        for arm in axis.arms
    ]
    columns = [
        "arm",
        metric,
        "difference",
        "mean over the budget",
        "difference",
        f"spent to reach {level}",
        "seeds that do",
    ]
    origin = "" if axis.is_level_given else f", what {comparison.baseline} has at the end"
    lines = [f"{level} is the level{origin}; the mean curve's first time there counts."]
    if axis.axis in INFORMATION:
        lines.append("For information: no cap is on this number, and what is cached costs next to nothing.")
    return Sheet(f"At {spending(axis.axis, axis.budget)}", columns, rows, lines)


def _costs(comparison: Comparison) -> Sheet:
    arms = comparison.costs
    names = [name for name in COSTS if any(costs.get(name) for costs in arms.values())]
    rows = [[arm, *(amount(name, costs.get(name, 0.0)) for name in names)] for arm, costs in arms.items()]
    return Sheet("What a run cost at its end, mean over seeds", ["arm", *(COSTS[name] for name in names)], rows, [])


def _options(comparison: Comparison) -> Sheet:
    rows = [[name, *(_option(given[arm]) for arm in comparison.costs)] for name, given in comparison.differences]
    lines = [] if rows else ["The saved configurations are the same, or missing."]
    return Sheet("What differs between the arms", ["option", *comparison.costs], rows, lines)


def _option(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def estimate_text(found: Estimate, metric: str) -> str:
    """The value and its interval."""
    if found.low is None or found.high is None:
        return number(found.value, metric)
    low, high = (max(0.0, found.low), min(1.0, found.high)) if is_share(metric) else (found.low, found.high)
    return f"{number(found.value, metric)} [{number(low, metric, '')}, {number(high, metric, '')}]"


def difference(found: Estimate, metric: str) -> str:
    """A signed difference and its interval; of shares in points."""
    scale, form, unit = (100, "+.1f", " points") if is_share(metric) else (1, "+.4g", "")
    text = f"{format(scale * found.value, form)}{unit}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{format(scale * found.low, form)}, {format(scale * found.high, form)}]"


def number(value: float, metric: str, unit: str = " %") -> str:
    """A value of the metric."""
    return f"{100 * value:.1f}{unit}" if is_share(metric) else f"{value:.4g}"


def amount(axis: str, value: float) -> str:
    """An amount that was spent."""
    if axis == "seconds":
        return duration(value)
    return f"{value:,.1f}" if value % 1 and value < 100 else f"{value:,.0f}"


def spending(axis: str, value: float) -> str:
    """An amount with what it is of."""
    return f"{amount(axis, value)} of training" if axis == "seconds" else f"{amount(axis, value)} {AXES[axis]}"


def is_share(metric: str) -> bool:
    """Whether the metric is shown in percent."""
    return metric.startswith(SHARES)
