"""What one run of the contract found, as it is handed over between processes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FILE = "facts.json"
Unit = tuple[str, float, float, float, float]
"""A row, or the rows of a pair: a hash of tokens, mask and images; sum and squares of its advantages, and of
`old_logprobs`."""


@dataclass(frozen=True)
class Difference:
    """Of a gradient over all trainable weights from the baseline's, in float64."""

    one_minus_cosine: float
    norm: float
    """|norm of one - norm of the other|, relative to the baseline's."""
    largest: float
    """Of any entry, relative to the baseline's largest entry."""
    weight: str
    """The name of the weight with that entry."""


@dataclass(frozen=True)
class Facts:
    """One optimiser step."""

    model: str
    precision: str
    device: str
    ranks: int
    is_sharded: bool
    shares: bool
    """Whether prefixes were shared: a model may refuse it."""
    refusal: str
    """Why it does."""
    micro_batches: int
    """Of the rank with the most."""
    rows_per_rank: list[int]
    units: list[Unit]
    """Of all ranks, sorted."""
    longest: int
    """Tokens of the longest row."""
    largest_unit: int
    """Padded tokens of the largest row, or pair."""
    loss: float
    """What was differentiated: summed over micro-batches, averaged over ranks as gradients are."""
    logged: float | None
    """`train/loss` as it was logged; None where nothing was logged under that name."""
    norm: float
    """Of the gradient."""
    num_weights: int
    """Trainable numbers."""
    seconds: float
    """From the first micro-batch to the end of the step, without what recording took."""
    peak_bytes: int
    """Memory of the largest rank: resident, or on its GPU."""
    difference: Difference | None = None
    """From the baseline; None in the baseline's own."""

    @property
    def num_rows(self) -> int:
        """With a loss, on all ranks."""
        return sum(self.rows_per_rank)


def write(facts: Facts, folder: Path) -> None:
    """Into a folder that exists."""
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(facts)))


def read(folder: Path) -> Facts | None:
    """None where the run ended before it had found them."""
    if not (folder / FILE).is_file():
        return None
    found = json.loads((folder / FILE).read_text())
    difference = found.pop("difference")
    units = [tuple(unit) for unit in found.pop("units")]
    return Facts(**found, units=units, difference=None if difference is None else Difference(**difference))
