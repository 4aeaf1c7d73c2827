"""GiGPO: episodes compared within their group, and steps compared with those taken in the same state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lit_agentrl.advantages import GiGPOAdvantages, gigpo_advantages
from lit_agentrl.anchors import AnchorKind, anchor_keys, group_similar, numbered
from lit_agentrl.errors import UserError
from lit_agentrl.methods.base import PolicyModule
from lit_agentrl.types import Advantages, Trajectory, TrajectoryGroup

SIZES = (1, 2, 4, 8, 16, 32)
"""Lower borders of the bins that anchor groups are counted in by their size."""
SIZE_NAMES = [
    *(f"{low}_{high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(SIZES)),
    f"{SIZES[-1]}_up",
]


class GiGPOModule(PolicyModule):
    """Group-in-group policy optimisation (arXiv 2505.10978): A = A^E + step_weight * A^S, on every token of a step.

    The episode's reward R is `Trajectory.total_reward`, the weighted sum of the reward functions. Steps are paid what
    the environment paid them, and the last one also what R holds beyond their sum, so that r_1 + ... + r_T = R at both
    levels. With the default reward, the episode's return, nothing is left over and r_t is the environment's (Eq. 5).

    Args:
        gamma: Discount of the step returns.
        step_weight: Weight of the step level, the paper's omega; 0 is GRPO on steps.
        scale: Divide deviations by the group's standard deviation (`std`), or not (`none`), at both levels.
        baseline: Take the episode statistics over trajectories (Eq. 3), or over rows as the authors' code does.
        singleton: What a group of one (`baseline: row`: one row) gets at the episode level: 0, or its raw score.
        step_rewards: `environment` as above; `outcome` pays all of R to the last step, whatever the environment paid.
        invalid_penalty: Taken off where the environment says an action could not be used (`Step.valid` is False).
        penalty: Who pays it: `local` is the step itself, at both levels, after discounting; `discounted` makes it a
            part of r_t, so that earlier steps and the whole episode pay too.
        anchor: What makes two states the same (see `lit_agentrl.anchors.anchor_keys`).
        history: Pairs of `anchor: text_history`.
        similarity: With `anchor: text`, texts at least this alike are one state; None asks for equal ones.
        autojunk: See `lit_agentrl.anchors.group_similar`.
        preset: `verl_agent` computes the numbers of the authors' code: it sets `baseline: row`, `singleton: raw`,
            `penalty: local`, `step_rewards: environment`, `anchor: text`, and for `similarity` autojunk and the order
            of the rows.
        **kwargs: See `PolicyModule`.
    """

    def __init__(
        self,
        gamma: float = 0.95,
        step_weight: float = 1.0,
        scale: Literal["std", "none"] = "std",
        baseline: Literal["trajectory", "row"] = "trajectory",
        singleton: Literal["zero", "raw"] = "zero",
        step_rewards: Literal["environment", "outcome"] = "environment",
        invalid_penalty: float = 0.1,
        penalty: Literal["local", "discounted"] = "local",
        anchor: AnchorKind = "text",
        history: int = 2,
        similarity: float | None = None,
        autojunk: bool = False,
        preset: Literal["verl_agent"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if preset == "verl_agent":
            baseline, singleton, penalty, step_rewards = "row", "raw", "local", "environment"
            anchor, autojunk = "text", True
        if not 0 <= gamma <= 1:
            raise UserError(f"gamma={gamma}: a discount lies in [0, 1].")
        if invalid_penalty < 0:
            raise UserError(f"invalid_penalty={invalid_penalty}: it is what is taken off, and must not be below 0.")
        if history < 0:
            raise UserError(f"history={history}: must be 0 pairs or more.")
        if similarity is not None and not 0 < similarity <= 1:
            raise UserError(f"similarity={similarity}: must be above 0 and at most 1, or null for equal texts.")
        if similarity is not None and anchor != "text":
            raise UserError(
                f"similarity={similarity} compares texts, but anchor is {anchor!r}. Set --model.anchor text."
            )
        self.gamma, self.step_weight, self.scale = gamma, step_weight, scale
        self.baseline, self.singleton, self.step_rewards = baseline, singleton, step_rewards
        self.invalid_penalty, self.penalty = invalid_penalty, penalty
        self.anchor, self.history, self.similarity, self.autojunk = anchor, history, similarity, autojunk
        self.preset = preset
        self.advantage_sums = statistics(_EMPTY, _NOTHING, [])

    def advantages(self, group: TrajectoryGroup) -> Advantages:
        """A^E + step_weight * A^S of every step."""
        return _per_group([group], self._values(self._table([group])).total)[0]

    def batch_advantages(self, groups: Sequence[TrajectoryGroup]) -> list[Advantages]:
        """The same for all groups at once; keeps what is logged of them."""
        table = self._table(groups)
        values = self._values(table)
        advantages = _per_group(groups, values.total)
        self.advantage_sums = statistics(table, values, advantages)
        return advantages

    def _table(self, groups: Sequence[TrajectoryGroup]) -> StepTable:
        """All steps of the groups, [B], trajectory by trajectory."""
        members = [(g, trajectory) for g, group in enumerate(groups) for trajectory in group.trajectories]
        owners = [(g, i, t) for i, (g, trajectory) in enumerate(members) for t in range(len(trajectory.steps))]
        steps = [step for _, trajectory in members for step in trajectory.steps]
        scores = [trajectory.total_reward for _, trajectory in members for _ in trajectory.steps]
        paid = [reward for _, trajectory in members for reward in self._paid(trajectory)]
        index = torch.tensor(owners, dtype=torch.int64).reshape(-1, 3)
        return StepTable(
            scores=torch.tensor(scores, dtype=torch.float64),
            rewards=torch.tensor(paid, dtype=torch.float64),
            penalties=torch.tensor([self.invalid_penalty * (step.valid is False) for step in steps]).double(),
            groups=index[:, 0],
            trajectories=index[:, 1],
            times=index[:, 2],
            anchors=torch.tensor(self._anchors(members, index[:, 0].tolist()), dtype=torch.int64),
        )

    def _paid(self, trajectory: Trajectory) -> list[float]:
        """r_t of each step, [K]; they add up to the total reward."""
        paid = [step.reward if self.step_rewards == "environment" else 0.0 for step in trajectory.steps]
        if paid:
            paid[-1] += trajectory.total_reward - sum(paid)
        return paid

    def _anchors(self, members: Sequence[tuple[int, Trajectory]], groups: list[int]) -> list[int]:
        """An integer for the state of each step, [B]; equal within a group where the states are the same."""
        keys = [key for _, trajectory in members for key in anchor_keys(trajectory, self.anchor, self.history)]
        if self.similarity is None:
            return numbered(keys)
        order: Literal["canonical", "batch"] = "batch" if self.preset == "verl_agent" else "canonical"
        return group_similar([str(key) for key in keys], groups, self.similarity, self.autojunk, order=order)

    def _values(self, table: StepTable) -> GiGPOAdvantages:
        if self.penalty == "local":
            scores, rewards, penalties = table.scores, table.rewards, table.penalties
        else:
            fines = torch.zeros(len(table) + 1, dtype=torch.float64).index_add(0, table.trajectories, table.penalties)
            scores, rewards, penalties = table.scores - fines[table.trajectories], table.rewards - table.penalties, None
        return gigpo_advantages(
            scores,
            rewards,
            table.groups,
            table.trajectories,
            table.times,
            table.anchors,
            gamma=self.gamma,
            step_weight=self.step_weight,
            scale=self.scale,
            baseline=self.baseline,
            singleton=self.singleton,
            penalties=penalties,
        )


@dataclass(frozen=True, slots=True)
class StepTable:
    """B steps as columns, each [B]."""

    scores: Tensor
    """The reward of the step's episode."""
    rewards: Tensor
    """What the step was paid."""
    penalties: Tensor
    groups: Tensor
    trajectories: Tensor
    times: Tensor
    anchors: Tensor

    def __len__(self) -> int:
        """How many steps."""
        return len(self.scores)


def statistics(
    table: StepTable, values: GiGPOAdvantages, advantages: Sequence[Advantages]
) -> dict[str, tuple[float, float]]:
    """Sums and counts of what GiGPO logs: levels, singletons, sizes of anchor groups, groups without any signal."""
    num_steps = float(len(table))
    _, states = torch.unique(torch.stack([table.groups, table.anchors], dim=1), dim=0, return_inverse=True)
    sizes = torch.bincount(states)
    bins = torch.bucketize(sizes, torch.tensor(SIZES), right=True) - 1
    counts = torch.bincount(bins, minlength=len(SIZES)).tolist()
    silent = sum(not any(any(steps) for steps in group) for group in advantages)
    return {
        "gigpo/episode_advantage": (float(values.episode.sum()), num_steps),
        "gigpo/step_advantage": (float(values.step.sum()), num_steps),
        "gigpo/step_advantage_size": (float(values.step.abs().sum()), num_steps),
        "gigpo/lone_steps": (float(counts[0]), num_steps),
        "gigpo/zero_signal": (float(silent), float(len(advantages))),
        **{
            f"gigpo/anchors_of_{name}": (float(n), float(len(sizes)))
            for name, n in zip(SIZE_NAMES, counts, strict=True)
        },
    }


def _per_group(groups: Sequence[TrajectoryGroup], totals: Tensor) -> list[Advantages]:
    """The advantages of all steps, [B], as [P][G][K]."""
    rest = iter(totals.tolist())
    return [[[next(rest) for _ in trajectory.steps] for trajectory in group.trajectories] for group in groups]


_NO_IDS = torch.empty(0, dtype=torch.int64)
_NO_VALUES = torch.empty(0, dtype=torch.float64)
_EMPTY = StepTable(_NO_VALUES, _NO_VALUES, _NO_VALUES, _NO_IDS, _NO_IDS, _NO_IDS, _NO_IDS)
_NOTHING = GiGPOAdvantages(_NO_VALUES, _NO_VALUES, _NO_VALUES)
