"""Learning-rate schedules, stepped once per optimiser step, for `--model.lr_scheduler`."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_agentrl.errors import UserError


class WarmupCosine(LambdaLR):
    """Linear warm-up to the optimiser's learning rate, then a half cosine down to `floor` times it.

    Args:
        optimizer: What is scheduled.
        warmup_steps: Optimiser steps of the warm-up.
        total_steps: Optimiser steps of the whole run; the rate stays at the floor after them.
        floor: The final rate, as a share of the highest.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, floor: float = 0.0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise UserError(
                f"WarmupCosine(warmup_steps={warmup_steps}, total_steps={total_steps}): needs 0 <= warmup < total."
            )

        def share(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

        super().__init__(optimizer, share)
