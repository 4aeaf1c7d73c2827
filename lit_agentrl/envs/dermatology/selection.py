"""Which images of a layout are used, under which names, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_agentrl.envs.dermatology.labels import plain
from lit_agentrl.errors import UserError

OtherLabels = Literal["refuse", "drop"]
Unreadable = Literal["fail", "refuse", "drop"]


@dataclass(frozen=True)  # no slots: the command line reads defaults from `vars`
class Selection:
    """Which images of a layout are used, under which names, and in which split.

    Raises:
        UserError: An option is unknown or out of range.
    """

    labels: list[str] | None = None
    """The names that count, in their order; None for those of the dataset."""
    names: dict[str, str] | None = None
    """What labels are called, by how the dataset writes them: `{bkl: seborrheic keratosis}`."""
    other_labels: OtherLabels = "refuse"
    """What happens to images of a label that is not in `labels`: an error, or they are left out and counted."""
    val_share: float = 0.1
    """Share of every label's images for val, where the layout has no val split."""
    test_share: float = 0.1
    """The same for test."""
    max_per_class: int | None = None
    """Images of a label in the train split; None for all. The authors took at most 100."""
    max_held_out_per_class: int | None = None
    """Images of a label in val, and in test; None for all."""
    unreadable: Unreadable = "fail"
    """What happens to image files that cannot be read: each fails the episodes that show it (`fail`), or all files are
    decoded when the layout is listed, and a broken one is an error (`refuse`), or left out and counted (`drop`). Above
    `images.MAX_PIXELS` a file counts as broken there, whatever `Resize.refuse_above` is."""
    seed: int = 0
    """Of the splits, of what a cap keeps, and of the order."""

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.val_share + self.test_share >= 1:
            raise UserError(f"val_share={self.val_share} and test_share={self.test_share} leave nothing for training.")
        for name in ("max_per_class", "max_held_out_per_class"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise UserError(f"{name}={count} must be at least 1, or null for all images.")
        if self.other_labels not in ("refuse", "drop"):
            raise UserError(f"other_labels={self.other_labels!r} is unknown; allowed are refuse and drop.")
        if self.unreadable not in ("fail", "refuse", "drop"):
            raise UserError(f"unreadable={self.unreadable!r} is unknown; allowed are fail, refuse and drop.")
        if self.labels is not None and len({plain(label) for label in self.labels} - {""}) < max(2, len(self.labels)):
            raise UserError(f"labels={self.labels}: at least two are needed, all different.")
