"""All that the doctor found, as numbers: what is printed, and what `--json` writes."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from lit_agentrl.doctor.cost import Cost, SideCost
from lit_agentrl.doctor.equality import Equality
from lit_agentrl.doctor.noise import Noise, Ratios
from lit_agentrl.doctor.plan_report import MemoryFindings, Trial
from lit_agentrl.doctor.plan_step import StepBytes
from lit_agentrl.doctor.recommendation import Advice, Sharing
from lit_agentrl.doctor.rows import Reuse


@dataclass(frozen=True)
class Findings:
    """The report."""

    model: str
    precision: str
    device: str
    data: str
    """Where the rows came from."""
    collected: Reuse
    """Of the micro-batches that training would have got."""
    measured: Reuse
    """Of the rows that were looked at."""
    repeats: int
    """Timings of each side that were asked for."""
    is_configured_to_share: bool
    sharing: Sharing
    equality: Equality | None
    """None where the model refuses sharing: there is nothing to compare."""
    cost: Cost
    noise: Noise | None
    """None where nothing was sampled."""
    advice: list[Advice]
    memory: MemoryFindings | None = None
    """None where the planner does not know the model."""
    unplanned: str = ""
    """Why."""

    @property
    def is_healthy(self) -> bool:
        """Whether this configuration may be trained: what it shares is equal, what it clips is not noise."""
        is_equal = self.equality is None or self.equality.is_healthy or not self.is_configured_to_share
        return is_equal and (self.noise is None or self.noise.is_healthy)

    def to_json(self) -> str:
        """Every number, with the ratios that are made of them; null where there is none."""
        return json.dumps({"is_healthy": self.is_healthy} | plain(self), indent=2)


DERIVED: dict[type, tuple[str, ...]] = {
    Reuse: ("ratio", "padded_ratio"),
    Equality: ("allowed", "is_healthy"),
    Sharing: ("gate",),
    SideCost: ("median_seconds",),
    Cost: ("speedup", "memory_ratio"),
    Ratios: ("outside", "is_healthy"),
    Noise: ("is_healthy",),
    StepBytes: ("weights", "peak"),
    Trial: ("error",),
}
"""Properties that are written beside the fields."""


def plain(value: Any) -> Any:
    """The same of dictionaries, lists and numbers that JSON has; NaN and infinity become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)] + list(DERIVED.get(type(value), ()))
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
