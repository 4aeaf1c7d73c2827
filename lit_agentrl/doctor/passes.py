"""Forward and backward passes of rows through one policy or another by the module's own `score`; no update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_agentrl.doctor.rows import select
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.types import TrainBatch

Plan = Sequence[Sequence[int]]
"""Row indices of each micro-batch."""


@dataclass(frozen=True)
class Passes:
    """Runs rows through a policy in the module's place; nothing is updated."""

    module: LanguageModule
    precision: Callable[[], AbstractContextManager[object]]
    """The trainer's: what training enters around every forward."""
    rows: TrainBatch
    """On the module's device, `advantages` as the loss weighs them."""
    deadline: float = math.inf
    """`time.perf_counter()` from which on nothing is repeated that can be done without."""

    def logprobs(self, policy: nn.Module, plan: Plan, *, autocast: bool = True, grad: bool = False) -> Tensor:
        """[B, L] of all rows, at least float32, detached.

        Args:
            policy: Scores the rows.
            plan: Micro-batches.
            autocast: Whether to compute in the trainer's precision; False: in that of the policy's weights.
            grad: Whether to record what a backward pass needs, as training does.
        """
        found: Tensor | None = None
        with torch.set_grad_enabled(grad), self._using(policy):
            for indices in plan:
                with self.precision() if autocast else torch.autocast(self.device.type, enabled=False):
                    logp = self.module.score(select(self.rows, indices)).logprobs.detach()
                if found is None:
                    found = logp.new_zeros(self.rows.token_ids.shape)
                found[list(indices)] = logp
        assert found is not None
        return found

    def gradients(self, policy: nn.Module, plan: Plan) -> list[Tensor]:
        """Of the loss, one tensor per trainable parameter in the module's order; zeros where none arrived."""
        self.run(policy, plan)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable()]
        self.clear()
        return found

    def run(self, policy: nn.Module, plan: Plan) -> None:
        """Forward, loss and backward of every micro-batch; leaves their summed gradients."""
        self.clear()
        self.accumulate(policy, plan)

    def accumulate(self, policy: nn.Module, plan: Plan) -> None:
        """`run` that adds to the gradients there are."""
        with self._using(policy):
            for indices in plan:
                batch = select(self.rows, indices)
                with self.precision():
                    logp = self.module.score(batch, entropy=True).logprobs
                    loss = -(batch.advantages * logp).sum() / self.rows.num_action_tokens
                loss.backward()  # type: ignore[no-untyped-call]

    def seconds(self, policy: nn.Module, plan: Plan) -> float:
        """Wall seconds of `run`."""
        self._wait()
        began = time.perf_counter()
        self.run(policy, plan)
        self._wait()
        took = time.perf_counter() - began
        self.clear()
        return took

    @property
    def is_late(self) -> bool:
        """Whether the deadline is over: another process may take the cores that one row was timed on."""
        return time.perf_counter() > self.deadline

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.token_ids.device

    @contextmanager
    def _using(self, policy: nn.Module) -> Iterator[None]:
        own = self.module.policy
        self.module.policy = policy
        try:
            yield
        finally:
            self.module.policy = own

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def trainable(self) -> list[nn.Parameter]:
        """The module's trained weights."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.trainable():
            parameter.grad = None
