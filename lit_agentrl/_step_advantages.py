"""Advantages of single steps: discounted returns and GiGPO's two levels. Public through `lit_agentrl.advantages`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lit_agentrl._checks import check_choice, check_finite, check_same_length, checked_ids, checked_values, result_dtype
from lit_agentrl._segments import compact, normalise

if TYPE_CHECKING:
    from torch import Tensor

    from lit_agentrl._segments import Scale, Singleton


def discounted_returns(rewards: Tensor, trajectories: Tensor, times: Tensor, *, gamma: float) -> Tensor:
    """Return of every step, [B]: R_t = r_t + gamma R_{t+1} along its trajectory (GiGPO, arXiv 2505.10978, Eq. 5).

    Args:
        rewards: [B], what each step was paid.
        trajectories: [B] integer ids.
        times: [B] integers; they only order the steps of a trajectory, a gap is not discounted twice.
        gamma: Discount in [0, 1].

    Raises:
        ValueError: On a wrong shape, a non-integer id, a repeated time, a NaN or infinite reward, or a gamma outside.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must be in [0, 1].")
    x = checked_values("rewards", rewards)
    trajectory, time = checked_ids("trajectories", trajectories, x), checked_ids("times", times, x)
    rank, num_steps = compact(trajectory, time)
    if num_steps < len(x):
        raise ValueError("Two steps of one trajectory have the same time: their order, and so the return, is unknown.")
    order = rank.argsort()
    returns, owner = x[order], trajectory[order]
    # A suffix scan by doubling: before each round a step holds the rewards of its next `reach` steps, after it 2 reach.
    reach = 1
    while reach < len(x) and bool((follows := owner[reach:] == owner[:-reach]).any()):
        later = torch.where(follows, returns[reach:], 0.0)
        returns = returns + gamma**reach * torch.cat([later, later.new_zeros(reach)])
        reach *= 2
    return returns[rank].to(result_dtype(rewards))


@dataclass(frozen=True, slots=True)
class GiGPOAdvantages:
    """The two levels of GiGPO and their sum, each [B]."""

    episode: Tensor
    """The trajectory among those of its group (Eq. 3)."""
    step: Tensor
    """The step's return among the steps of its group taken in the same state (Eq. 7); 0 where the state is unique."""
    total: Tensor
    """episode + step_weight * step (Eq. 8)."""


def gigpo_advantages(
    episode_rewards: Tensor,
    step_rewards: Tensor,
    groups: Tensor,
    trajectories: Tensor,
    times: Tensor,
    anchors: Tensor,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    scale: Scale = "std",
    baseline: Literal["trajectory", "row"] = "trajectory",
    eps: float = 1e-6,
    singleton: Singleton = "zero",
    penalties: Tensor | None = None,
) -> GiGPOAdvantages:
    """Episode and step advantages of B steps (GiGPO, arXiv 2505.10978, Eq. 3-8), for one or many groups.

    With s = episode_rewards - penalties and R = discounted_returns(step_rewards) - penalties:
    episode = (s - mean_g) / (std_g + eps), step = (R - mean_(g, anchor)) / (std_(g, anchor) + eps).

    Args:
        episode_rewards: [B], the reward of the whole episode, repeated on each of its steps.
        step_rewards: [B], what each step was paid.
        groups: [B] integer ids of the task; steps of different groups never meet.
        trajectories: [B] integer ids; equal ids of two groups are two trajectories.
        times: [B] integers that order the steps of a trajectory.
        anchors: [B] integer ids of the state before the action.
        gamma: Discount of the step returns.
        step_weight: Weight of the step term.
        scale: As in `standardize`, at both levels.
        baseline: `trajectory` takes the episode statistics over trajectories as in Eq. 3: a row weighs 1 / (rows of its
            trajectory). `row` takes them over rows as the authors' code does: long episodes weigh more.
        eps: As in `standardize`.
        singleton: What a group of one trajectory (`row`: one row) gets at the episode level: 0, or its own score as in
            the authors' code. A state visited once always gets 0 at the step level.
        penalties: [B] for invalid actions, taken from the score and the return of that step alone (after discounting,
            so earlier steps do not pay). To let them pay, subtract them from `step_rewards` instead.

    Raises:
        ValueError: On a wrong shape, a non-integer id, a repeated time, a NaN or infinite number, or an unknown option.
    """
    check_choice("baseline", baseline, ("trajectory", "row"))
    check_finite(step_weight=step_weight)
    score, reward = checked_values("episode_rewards", episode_rewards), checked_values("step_rewards", step_rewards)
    check_same_length("step_rewards", reward, score)
    dtype = torch.promote_types(result_dtype(episode_rewards), result_dtype(step_rewards))
    penalty = torch.zeros_like(score) if penalties is None else checked_values("penalties", penalties)
    check_same_length("penalties", penalty, score)
    group, anchor = checked_ids("groups", groups, score), checked_ids("anchors", anchors, score)
    trajectory, num_trajectories = compact(group, checked_ids("trajectories", trajectories, score))
    # Rounded to the caller's precision: two sums that differ only in float64 digits are the same return, hence 0.
    score = (score - penalty).to(dtype).double()
    returns = (discounted_returns(reward, trajectory, times, gamma=gamma) - penalty).to(dtype).double()
    rows = torch.bincount(trajectory, minlength=num_trajectories).double()[trajectory]
    weights = 1 / rows if baseline == "trajectory" else torch.ones_like(rows)
    episode = normalise(score, *compact(group), scale, eps, singleton=singleton, weights=weights).to(dtype)
    step = normalise(returns, *compact(group, anchor), scale, eps).to(dtype)
    return GiGPOAdvantages(episode, step, episode + step_weight * step)
