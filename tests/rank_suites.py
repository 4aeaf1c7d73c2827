"""Environments for runs on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_agentrl.types import Observation, Split
from vlm_fits import Slides, SlidesEnvironment


class OneSlide(Slides):
    """Two tasks, one with a picture: of two ranks that share two prompts, one always sees none."""

    def tasks(self, split: Split) -> Sequence[str]:
        return super().tasks(split)[:2]

    def make(self, task: str) -> SlidesEnvironment:
        kind = SlidesEnvironment if task.endswith("1") else BlindEnvironment
        return kind(task, self.turns)


class BlindEnvironment(SlidesEnvironment):
    """The same words without a picture."""

    def _observe(self, system: str = "") -> Observation:
        return replace(super()._observe(system), images=())
