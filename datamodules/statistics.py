"""The numbers of an iteration's rollouts, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lit_agentrl import distributed
from lit_agentrl.rewards import Reward
from lit_agentrl.rows import Row
from lit_agentrl.types import Ledger, StopReason, Trajectory, TrajectoryGroup


def iteration_metrics(
    groups: Sequence[TrajectoryGroup],
    rows: Sequence[Sequence[Row]],
    rewards: Sequence[Reward],
    rounds: int,
    num_leaked: int,
) -> dict[str, float]:
    """Means over all healthy trajectories of the iteration, shares and counts; the same keys on every rank, always.

    `groups` are all that were collected, `rows` those of the groups that are trained. A step that trajectories of a
    tree share is in the mean of each; `tokens/generated` and what is spent count it once.
    """
    every = [t for group in groups for t in group.trajectories]
    healthy = [t for t in every if not t.stop_reason.is_failure]
    steps = [step for t in healthy for step in t.steps]
    sums = {
        "episodes": float(len(every)),
        "healthy": float(len(healthy)),
        "groups": float(len(groups)),
        "steps": float(len(steps)),
        "reward": sum(t.total_reward for t in healthy),
        "reward_squared": sum(t.total_reward**2 for t in healthy),
        "success": float(sum(t.success is True for t in healthy)),
        "judged": float(sum(t.success is not None for t in healthy)),
        "action_tokens": float(sum(len(step.action_ids) for step in steps)),
        "context_tokens": float(sum(_length(t) for t in healthy)),
        "valid": float(sum(step.valid is True for step in steps)),
        "checked": float(sum(step.valid is not None for step in steps)),
        "truncated": float(sum(t.stop_reason.is_token_limit for t in healthy)),
        "shortened": float(sum(t.num_shortened for t in healthy)),
        "zero_signal": float(sum(_flat(group) for group in groups)),
        "rows": float(sum(len(group_rows) for group_rows in rows)),
        "row_tokens": float(sum(len(row.token_ids) for group_rows in rows for row in group_rows)),
        "generated": float(sum(group.cost.generated_tokens for group in groups)),
        "not_begun": float(sum(group.num_not_begun for group in groups)),
        "env_seconds": sum(group.cost.env_seconds for group in groups),
        "leaked": float(num_leaked),
    }
    sums |= {f"stop/{reason}": float(sum(t.stop_reason is reason for t in every)) for reason in StopReason}
    sums |= {f"reward/{r.label}": sum(t.rewards.get(r.label, 0.0) for t in healthy) for r in rewards}
    total = dict(zip(sums, distributed.reduce_floats(list(sums.values())), strict=True))
    healthy_count, groups_count = max(1.0, total["healthy"]), max(1.0, total["groups"])
    mean = total["reward"] / healthy_count
    return {
        "reward/mean": mean,
        "reward/std": max(0.0, total["reward_squared"] / healthy_count - mean**2) ** 0.5,
        **{f"reward/{r.label}": total[f"reward/{r.label}"] / healthy_count for r in rewards},
        "success": total["success"] / max(1.0, total["judged"]),
        "length/steps": total["steps"] / healthy_count,
        "length/action_tokens": total["action_tokens"] / max(1.0, total["steps"]),
        "length/episode_tokens": total["context_tokens"] / healthy_count,
        "valid_actions": total["valid"] / max(1.0, total["checked"]),
        "truncated": total["truncated"] / healthy_count,
        "shortened_prompts": total["shortened"] / max(1.0, total["steps"]),
        "zero_signal": total["zero_signal"] / groups_count,
        "failed": total["episodes"] - total["healthy"],
        "rounds": float(max(distributed.reduce_integers([rounds], "max"))),
        **{f"stop/{reason}": total[f"stop/{reason}"] for reason in StopReason},
        "tokens/generated": total["generated"],
        "tokens/trained": total["row_tokens"],
        "rows": total["rows"],
        "time/environment": total["env_seconds"],
        "workers_leaked": total["leaked"],
        "budget/not_begun": total["not_begun"],
    }


def environment_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """`environment/<name>`: means of the environments' own numbers over the healthy trajectories that have them."""
    own = [t.metrics for group in groups for t in group.trajectories if not t.stop_reason.is_failure]
    # Which numbers there are, only trajectories tell, and a rank may have none.
    names = sorted({name for names in distributed.gather(sorted({n for m in own for n in m})) for name in names})
    return reduced_means(
        {
            f"environment/{name}": (sum(m[name] for m in own if name in m), float(sum(name in m for m in own)))
            for name in names
        }
    )


def iteration_cost(groups: Sequence[TrajectoryGroup]) -> Ledger:
    """What the groups of all ranks cost together; the counts are exact."""
    mine = asdict(sum((group.cost for group in groups), Ledger()))
    seconds = [name for name in mine if name.endswith("_seconds")]
    counts = [name for name in mine if name not in seconds]
    mine |= zip(counts, distributed.reduce_integers([mine[name] for name in counts]), strict=True)
    mine |= zip(seconds, distributed.reduce_floats([mine[name] for name in seconds]), strict=True)
    return Ledger(**mine)


def budget_metrics(cost: Ledger, totals: Ledger) -> dict[str, float]:
    """`budget/<entry>` of the iteration, and `budget/total_<entry>` of the run with this iteration."""
    return {f"budget/{name}": float(value) for name, value in asdict(cost).items()} | {
        f"budget/total_{name}": float(value) for name, value in asdict(totals).items()
    }


def reduced_means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means over all ranks of what each gives as a sum and a count; 0 where there is nothing to count."""
    flat = distributed.reduce_floats([number for pair in sums.values() for number in pair])
    return {name: flat[2 * i] / flat[2 * i + 1] if flat[2 * i + 1] else 0.0 for i, name in enumerate(sums)}


def _length(trajectory: Trajectory) -> int:
    """Tokens the episode held at its end."""
    last = trajectory.steps[-1] if trajectory.steps else None
    return len(last.context_ids) + len(last.action_ids) if last else 0


def _flat(group: TrajectoryGroup) -> bool:
    """Whether no trajectory earned more than another."""
    return len({t.total_reward for t in group.trajectories if not t.stop_reason.is_failure}) < 2
