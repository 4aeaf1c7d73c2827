"""Gathering an iteration's rollouts on one rank, at once or ahead of time: no rank waits for another in here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from lit_agentrl.datamodules.background import Background, StoppableEngine
from lit_agentrl.datamodules.prompts import PromptCursor
from lit_agentrl.rollouts.base import Prompt
from lit_agentrl.types import Engine, TrajectoryGroup

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long the end of a run waits for rollouts that nobody needs; the engine's call under way has to end first."""


@dataclass(frozen=True)
class Seat:
    """Who samples, in which thread's arithmetic."""

    engine: Engine
    arithmetic: Callable[[], AbstractContextManager[object]]
    """What the engine's forwards run in."""


@dataclass(frozen=True)
class Order:
    """What is to be collected for an iteration on this rank."""

    iteration: int
    first: int
    """The running number of the iteration's first prompt, over all ranks."""
    num_trained: int
    """Iterations that the policy which the engine samples from was trained for."""

    @property
    def staleness(self) -> int:
        """How many iterations the policy that samples lies behind the one that learns."""
        return self.iteration - self.num_trained


@dataclass(frozen=True)
class Collection:
    """What came of it."""

    order: Order
    groups: list[TrajectoryGroup]
    """All that was played."""
    trained: list[TrajectoryGroup]
    """Those to train on."""
    rounds: int
    """How often prompts were asked for: dynamic sampling replaces those without signal."""
    seconds: float
    """How long it took where it ran."""


@dataclass(frozen=True)
class Rounds:
    """Which prompts of an iteration are this rank's, round after round."""

    cursor: PromptCursor
    num_prompts: int
    """Of all ranks together."""
    max_rounds: int
    rank: int
    size: int

    def collect(
        self,
        order: Order,
        play: Callable[[Sequence[Prompt]], list[TrajectoryGroup]],
        has_signal: Callable[[TrajectoryGroup], bool],
    ) -> Collection:
        """Play prompts until enough groups have signal, or the rounds are used up.

        Args:
            order: What for.
            play: Gives one group a prompt.
            has_signal: Whether a group is worth training on; not asked where there is one round only.
        """
        began = time.perf_counter()
        wanted = len(range(self.rank, self.num_prompts, self.size))
        groups: list[TrajectoryGroup] = []
        trained: list[TrajectoryGroup] = []
        rounds = 0
        while rounds < self.max_rounds and len(trained) < wanted:
            first = order.first + rounds * self.num_prompts + self.rank
            fresh = play([self.cursor.at(first + i * self.size) for i in range(wanted - len(trained))])
            groups += fresh
            trained += fresh if self.max_rounds == 1 else [group for group in fresh if has_signal(group)]
            rounds += 1
        return Collection(order, groups, trained, rounds, time.perf_counter() - began)


class Prefetch:
    """An iteration's rollouts, collected in the background while the one before is trained.

    Args:
        order: What is collected.
        collect: Does it, on a seat beside training.
        engine: Samples; nothing else may use or sync it before `wait` returns.
        precision: The trainer's.
        device: The trainer's.
    """

    def __init__(
        self,
        order: Order,
        collect: Callable[[Seat], Collection],
        engine: Engine,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.order = order

        def run(stopped: threading.Event) -> Collection:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread starts with the first device, whatever its process uses
            return collect(Seat(StoppableEngine(engine, stopped), arithmetic_beside_training(precision)))

        self._background = Background(run, f"rollouts-{order.iteration}")
        self.wait = self._background.wait
        self.result = self._background.result

    def stop(self) -> None:
        """Give the rollouts up: training has ended."""
        if self._background.has_failed:
            return  # there are none
        has_ended = self._background.stop(STOP_SECONDS)
        log.info(
            "The rollouts collected ahead for iteration %d are dropped: training ended before it.%s",
            self.order.iteration,
            "" if has_ended else f" Their thread is still busy after {STOP_SECONDS:g} s and ends with the process.",
        )


def arithmetic_beside_training(precision: Precision) -> Callable[[], AbstractContextManager[object]]:
    """The trainer's arithmetic for another thread.

    Autocast belongs to a thread. Precisions such as `bf16-true` set torch's default type instead, for all threads, and
    would leave it wrong behind one another; a model that was loaded in the type does without.
    """
    return precision.forward_context if isinstance(precision, MixedPrecision) else nullcontext
