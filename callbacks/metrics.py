"""Numbers of an evaluation: success with its uncertainty, pass@k, rewards and lengths. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lit_agentrl.errors import UserError
from lit_agentrl.intervals import bootstrap_interval, wilson_interval
from lit_agentrl.types import TrajectoryGroup


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of n samples, drawn without return, hold a correct one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, Eq. 1).

    Raises:
        ValueError: If k is not in 1 ... n or c not in 0 ... n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, got n={num_samples}, c={num_correct}, k={k}.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluation_metrics(groups: Sequence[TrajectoryGroup], group_size: int = 1) -> dict[str, float]:
    """Means over tasks and episodes. Failed episodes are counted and left out of everything else.

    Where tasks have kinds, `success/<kind>` with its interval and `num_tasks/<kind>` tell them apart. The keys depend
    on `group_size`, the reward components and the kinds alone; a number that nothing supports is NaN
    (success where the environment does not say, pass@k where no task has k episodes left).
    """
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    finished = [trajectory for trajectory in episodes if not trajectory.stop_reason.is_failure]
    outcomes = [outcome for group in groups if (outcome := _outcomes(group))]
    components = sorted({name for trajectory in episodes for name in trajectory.rewards})
    return {
        **_success_metrics(outcomes, group_size),
        **_success_by_kind(groups, group_size),
        "reward/mean": _mean(trajectory.total_reward for trajectory in finished),
        **{
            f"reward/{name}": _mean(trajectory.rewards[name] for trajectory in finished if name in trajectory.rewards)
            for name in components
        },
        **{
            f"environment/{name}": _mean(t.metrics[name] for t in finished if name in t.metrics)
            for name in sorted({name for trajectory in episodes for name in trajectory.metrics})
        },
        "valid_actions": _mean(
            step.valid for trajectory in finished for step in trajectory.steps if step.valid is not None
        ),
        "length/steps": _mean(len(trajectory.steps) for trajectory in finished),
        "length/action_tokens": _mean(len(step.action_ids) for trajectory in finished for step in trajectory.steps),
        "truncated": _mean(trajectory.stop_reason.is_token_limit for trajectory in finished),
        "failed": float(len(episodes) - len(finished)),
        "num_tasks": float(len(outcomes)),
        "num_episodes": float(len(finished)),
    }


def joined(metrics: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """The numbers of every evaluation, and those of the suite.

    Raises:
        UserError: The suite calls one of its numbers like one of the others.
    """
    if clash := sorted(set(own) & set(metrics)):
        raise UserError(
            f"The suite's summary gives {', '.join(clash)}, which every evaluation measures. Give it another name."
        )
    return {**metrics, **own}


def _success_metrics(outcomes: Sequence[Sequence[bool]], group_size: int) -> dict[str, float]:
    """Success over tasks [tasks][episodes] with its interval, and pass@k for k = 2, 4, 8 ... and the group size."""
    shares = [sum(task) / len(task) for task in outcomes]
    success = _mean(shares)
    low, high = wilson_interval(sum(shares), len(shares)) if group_size == 1 else bootstrap_interval(shares)
    metrics = {"success": success, "success_low": low, "success_high": high}
    if group_size > 1:
        metrics[f"avg_at_{group_size}"] = success
        powers = {2**exponent for exponent in range(1, group_size.bit_length())}
        for k in sorted(powers | {group_size}):
            metrics[f"pass_at_{k}"] = _mean(pass_at_k(len(task), sum(task), k) for task in outcomes if len(task) >= k)
    return metrics


def _success_by_kind(groups: Sequence[TrajectoryGroup], group_size: int) -> dict[str, float]:
    """Success over the tasks of each kind with its interval, and how many there are; nothing where tasks have none."""
    metrics: dict[str, float] = {}
    for kind in sorted({group.kind for group in groups if group.kind}):
        outcomes = [outcome for group in groups if group.kind == kind and (outcome := _outcomes(group))]
        found = _success_metrics(outcomes, group_size)
        metrics |= {f"{name}/{kind}": found[name] for name in ("success", "success_low", "success_high")}
        metrics[f"num_tasks/{kind}"] = float(len(outcomes))
    return metrics


def _outcomes(group: TrajectoryGroup) -> list[bool]:
    """Whether each episode of a task succeeded; failed episodes and those of unknown outcome are left out."""
    return [
        trajectory.success
        for trajectory in group.trajectories
        if trajectory.success is not None and not trajectory.stop_reason.is_failure
    ]


def _mean(values: Iterable[float]) -> float:
    """The mean, NaN of nothing."""
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
