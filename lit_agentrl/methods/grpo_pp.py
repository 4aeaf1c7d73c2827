"""GRPO and GRPO++: group-relative policy optimisation, with every stabiliser an argument.

GRPO++ (arXiv 2510.01236) is "a modified version" of GRPO with a binary advantage; its exact objective is not public.
What is here as `binary` is a reconstruction (docs/grpo_pp.md tells which parts are known and which are inferred).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_agentrl import distributed
from lit_agentrl.advantages import binary_advantages, leave_one_out, spread, standardize, total_rewards
from lit_agentrl.errors import UserError
from lit_agentrl.methods.base import PolicyModule
from lit_agentrl.types import Advantages, TrajectoryGroup


class GRPOPlusPlusModule(PolicyModule):
    """GRPO++ and its relatives: the advantage is a choice, the loss is `PolicyModule`'s.

    | advantage | formula | source |
    |---|---|---|
    | `binary` | see `binary` below | GRPO++ (reconstruction) |
    | `grpo` | (r - mean_g) / (std_g + 1e-6) | GRPO, arXiv 2402.03300 |
    | `dr_grpo` | r - mean_g | Dr. GRPO, arXiv 2503.20783 |
    | `rloo` | r - mean of the others | RLOO, arXiv 2402.14740 |
    | `batch_std` | (r - mean_g) / (std of the iteration + 1e-6) | Lite PPO, arXiv 2508.08221 |

    Args:
        advantage: How rewards become advantages.
        binary: For `binary`: `sign` is +positive above `threshold` and -negative below; `threshold` is
            sign(r - threshold), 0 at it; `above_mean` is sign(r - mean_g); `correct_only` is `positive` above the
            threshold, else 0.
        positive: The advantage of a correct trajectory.
        negative: How far below 0 a wrong one is.
        threshold: The reward above which a trajectory counts as correct.
        advantage_clip: Bound on |A|; None is off.
        **kwargs: See `PolicyModule`.
    """

    def __init__(
        self,
        advantage: Literal["binary", "grpo", "dr_grpo", "rloo", "batch_std"] = "binary",
        binary: Literal["sign", "threshold", "above_mean", "correct_only"] = "sign",
        positive: float = 1.0,
        negative: float = 1.0,
        threshold: float = 0.5,
        advantage_clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if positive < 0 or negative < 0:
            raise UserError(f"positive={positive}, negative={negative}: both are sizes and must not be below 0.")
        if advantage_clip is not None and advantage_clip <= 0:
            raise UserError(f"advantage_clip={advantage_clip}: must be above 0, or null for no bound.")
        self.advantage, self.binary = advantage, binary
        self.positive, self.negative, self.threshold = positive, negative, threshold
        self.advantage_clip = advantage_clip
        # A fixed reference (sign, threshold, correct_only) needs no second trajectory to compare with.
        self.group_relative = advantage != "binary" or binary == "above_mean"

    def advantages(self, group: TrajectoryGroup) -> Advantages:
        """One advantage per trajectory, on all its steps."""
        rewards = total_rewards(group)
        match self.advantage:
            case "binary":
                values = self._binary(rewards)
            case "rloo":
                values = leave_one_out(rewards)
            case "dr_grpo":
                values = standardize(rewards, scale="none")
            case _:
                values = standardize(rewards)
        return spread(self._clip(values), group)

    def batch_advantages(self, groups: Sequence[TrajectoryGroup]) -> list[Advantages]:
        """Group by group, except `batch_std`, whose scale is the spread of the iteration's rewards on all ranks."""
        if self.advantage != "batch_std":
            return super().batch_advantages(groups)
        mine = [total_rewards(group) for group in groups]
        everyone = distributed.gather(mine)
        rank, _ = distributed.share()
        flat = [rewards for rewards_of_rank in everyone for rewards in rewards_of_rank]
        if not flat:
            return []
        ids = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor([len(rewards) for rewards in flat]))
        values = standardize(torch.cat(flat), ids, scale="batch_std")
        first = sum(len(rewards_of_rank) for rewards_of_rank in everyone[:rank])
        return [spread(self._clip(values[ids == first + i]), group) for i, group in enumerate(groups)]

    def _binary(self, rewards: Tensor) -> Tensor:
        return binary_advantages(
            rewards, mode=self.binary, positive=self.positive, negative=self.negative, threshold=self.threshold
        )

    def _clip(self, values: Tensor) -> Tensor:
        return values if self.advantage_clip is None else values.clamp(-self.advantage_clip, self.advantage_clip)
