"""Advantages: pure functions from rewards and integer ids to one number per row.

Every function computes in float64 and rounds once to the dtype it was given (integers and bools give the default float
dtype), so the result does not depend on the order of the rows and a float32 group mean is never one ulp off. A group in
which all values are equal gets exactly 0: rounding noise divided by `eps` would otherwise be a full-size advantage.
Ids are any integers; a group must lie whole in the tensors it is given in. Nothing here carries a gradient.

Trajectories whose `stop_reason.is_failure` say nothing about the policy: the caller removes them from the group first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from lit_agentrl._checks import check_choice, check_finite, checked_ids, checked_values, result_dtype
from lit_agentrl._segments import Scale, Singleton, compact, normalise
from lit_agentrl._step_advantages import GiGPOAdvantages, discounted_returns, gigpo_advantages

if TYPE_CHECKING:
    from torch import Tensor

    from lit_agentrl.types import Advantages, TrajectoryGroup

BinaryMode = Literal["sign", "threshold", "above_mean", "correct_only"]

__all__ = [
    "BinaryMode",
    "GiGPOAdvantages",
    "Scale",
    "Singleton",
    "binary",
    "binary_advantages",
    "discounted_returns",
    "gigpo_advantages",
    "leave_one_out",
    "spread",
    "standardize",
    "successes",
    "total_rewards",
    "tree_advantages",
    "tree_ids",
]


# --- groups of trajectories ---


def total_rewards(group: TrajectoryGroup) -> Tensor:
    """The total reward of each trajectory, [G] float64."""
    return torch.tensor([trajectory.total_reward for trajectory in group.trajectories], dtype=torch.float64)


def tree_ids(group: TrajectoryGroup) -> Tensor:
    """The tree that each trajectory is a leaf of, [G] int64."""
    return torch.tensor([trajectory.tree_id for trajectory in group.trajectories], dtype=torch.int64)


def successes(group: TrajectoryGroup) -> Tensor:
    """Whether each trajectory solved the task, [G] bool.

    Raises:
        ValueError: If the environment did not say so for some trajectory.
    """
    solved = [trajectory.success for trajectory in group.trajectories]
    if None in solved:
        raise ValueError(
            f"Trajectory {solved.index(None)} of prompt {group.prompt_id!r} has success=None: its environment does not "
            "say whether the task was solved. Set `success`, or use binary_advantages(total_rewards(group), ...)."
        )
    return torch.tensor(solved, dtype=torch.bool)


def spread(advantages: Tensor, group: TrajectoryGroup) -> Advantages:
    """The advantage of each trajectory, [G], on every one of its steps, [G][K].

    Raises:
        ValueError: If there is not exactly one finite advantage per trajectory.
    """
    per_trajectory = checked_values("advantages", advantages).tolist()
    if len(per_trajectory) != len(group.trajectories):
        raise ValueError(
            f"{len(per_trajectory)} advantages for the {len(group.trajectories)} trajectories of prompt "
            f"{group.prompt_id!r}: one each is needed."
        )
    return [[advantage] * len(t.steps) for advantage, t in zip(per_trajectory, group.trajectories, strict=True)]


# --- estimators ---


def standardize(
    values: Tensor,
    groups: Tensor | None = None,
    *,
    scale: Scale = "std",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Singleton = "zero",
) -> Tensor:
    """Values relative to their group, [N]: (x - mean_g) / (std_g + eps), and exactly 0 where all values of g are equal.

    GRPO (arXiv 2402.03300, 4.1.2). `scale="none"` leaves x - mean_g (Dr. GRPO, arXiv 2503.20783); `"batch_std"` divides
    by the std over all N values (Lite PPO, arXiv 2508.08221).

    Args:
        values: [N], finite.
        groups: [N] integer ids; None puts all values in one group.
        scale: What the deviation is divided by.
        eps: Added to the std, not inside the root.
        ddof: 1 for the unbiased std, 0 for the population's.
        singleton: What a group of one gets: 0, or its raw value (which is what verl and its descendants compute).

    Raises:
        ValueError: On a wrong shape, a non-integer id, a NaN or infinite value, or an unknown option.
    """
    x = checked_values("values", values)
    index, num_groups = compact(checked_ids("groups", groups, x))
    return normalise(x, index, num_groups, scale, eps, ddof, singleton).to(result_dtype(values))


def leave_one_out(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """Each value minus the mean of the others of its group, [N]: n / (n - 1) (x - mean_g). A group of one gets 0.

    RLOO (arXiv 2402.14740).

    Raises:
        ValueError: On a wrong shape, a non-integer id, a NaN or an infinite value.
    """
    x = checked_values("values", values)
    index, num_groups = compact(checked_ids("groups", groups, x))
    size = torch.bincount(index, minlength=num_groups).double()[index]
    return (normalise(x, index, num_groups, "none") * size / (size - 1).clamp(min=1)).to(result_dtype(values))


def binary(correct: Tensor, *, positive: float = 1.0, negative: float = 1.0) -> Tensor:
    """Binary advantage, [N]: +positive where correct, else -negative; 2c - 1 by default.

    The "sign" reading of GRPO++ (arXiv 2510.01236 names a binary advantage without a formula). It has no baseline, so
    an all-wrong group still learns; `negative` below 1 keeps such groups from only pushing down.

    Args:
        correct: [N], bool or 0/1.
        positive: Advantage of a correct answer.
        negative: Size of the (negative) advantage of a wrong one.

    Raises:
        ValueError: If `correct` is not 1-D or holds anything but 0 and 1, or a size is negative or not finite.
    """
    flags = checked_values("correct", correct)
    if not ((flags == 0) | (flags == 1)).all():
        raise ValueError("correct must be bool or 0/1. Use binary_advantages for rewards, which has a threshold.")
    return binary_advantages(flags.to(result_dtype(correct)), mode="sign", positive=positive, negative=negative)


def binary_advantages(
    rewards: Tensor,
    groups: Tensor | None = None,
    *,
    mode: BinaryMode,
    positive: float = 1.0,
    negative: float = 1.0,
    threshold: float = 0.5,
) -> Tensor:
    """The four readings of GRPO++'s "binary advantage" for rewards r, [N]; a = positive, b = negative.

    - `sign`: a if r > threshold else -b. Never 0.
    - `threshold`: a if r > threshold, -b if r < threshold, 0 at the threshold: a sign(r - threshold) for a = b.
    - `above_mean`: a if r > mean_g, -b if r < mean_g, 0 at the mean (up to rounding), so a uniform group gets 0.
    - `correct_only`: a if r > threshold else 0: imitates what was right, pushes nothing down.

    Args:
        rewards: [N], finite.
        groups: [N] integer ids; only `above_mean` compares within them. None puts all rewards in one group.
        mode: Which reading.
        positive: Advantage above.
        negative: Size of the (negative) advantage below.
        threshold: The reward that separates right from wrong.

    Raises:
        ValueError: On a wrong shape, a non-integer id, a NaN or infinite number, a negative size or an unknown mode.
    """
    check_choice("mode", mode, ("sign", "threshold", "above_mean", "correct_only"))
    for name, size in (("positive", positive), ("negative", negative)):
        if not 0 <= size < math.inf:
            raise ValueError(f"{name}={size} is the size of an advantage: finite, 0 or more (the sign is added here).")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold={threshold} must be a finite number.")
    x, dtype = checked_values("rewards", rewards), result_dtype(rewards)
    index, num_groups = compact(checked_ids("groups", groups, x))
    if mode == "above_mean":
        deviation = normalise(x, index, num_groups, "none")
        largest = x.new_zeros(num_groups).scatter_reduce(0, index, x.abs(), "amax")[index]
        # 0.2 is the mean of 0.1, 0.2, 0.3 but not in floating point: a tie is a deviation within the mean's rounding.
        side = torch.where(deviation.abs() <= 8 * torch.finfo(dtype).eps * largest, 0.0, deviation).sign()
    else:
        side = (x.to(dtype) - torch.tensor(threshold, dtype=dtype, device=x.device)).sign()
        if mode != "threshold":
            side = (side > 0).to(dtype) * 2 - 1
    below = 0.0 if mode == "correct_only" else negative
    return positive * (side > 0).to(dtype) - below * (side < 0).to(dtype)


def tree_advantages(
    rewards: Tensor,
    trees: Tensor,
    prompts: Tensor,
    *,
    intra_weight: float = 1.0,
    inter_weight: float = 1.0,
    scale: Scale = "std",
    eps: float = 1e-6,
    singleton: Singleton = "zero",
) -> Tensor:
    """Leaf advantage, [N]: intra_weight * A within the leaf's tree + inter_weight * A among all leaves of the prompt.

    Tree-GRPO (arXiv 2509.21240, Eq. 6-7), both terms from the raw rewards. Against the paper's code a tree of one leaf
    gets 0 in the first term, not its reward (`singleton="raw"` restores that), and equal leaves get exactly 0.

    Args:
        rewards: [N], one per leaf.
        trees: [N] integer ids; equal ids of two prompts are two trees.
        prompts: [N] integer ids.
        intra_weight: Weight of the term within the tree.
        inter_weight: Weight of the term within the prompt.
        scale: As in `standardize`.
        eps: As in `standardize`.
        singleton: As in `standardize`.

    Raises:
        ValueError: On a wrong shape, a non-integer id, a NaN or infinite number, or an unknown option.
    """
    check_finite(intra_weight=intra_weight, inter_weight=inter_weight)
    x = checked_values("rewards", rewards)
    prompt, tree = checked_ids("prompts", prompts, x), checked_ids("trees", trees, x)
    intra = normalise(x, *compact(prompt, tree), scale, eps, singleton=singleton)
    inter = normalise(x, *compact(prompt), scale, eps, singleton=singleton)
    return (intra_weight * intra + inter_weight * inter).to(result_dtype(rewards))
