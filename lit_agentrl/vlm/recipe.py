"""What can be chosen about the small VLM, and where a build of these choices lies in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lit_agentrl.cache import cache_dir
from lit_agentrl.errors import UserError
from lit_agentrl.models.made import MADE
from lit_agentrl.vlm.dinov2 import PATCH

NAME = "smollm2-dinov2"
LANGUAGE_MODEL = "smollm2-135m-instruct"
LARGEST_IMAGE = 448


@dataclass(frozen=True)
class Recipe:
    """The choices of a build. Equal ones make equal models on one machine with one number of threads.

    Who changes what they do gives the default recipe another folder in `MADE`.

    Raises:
        UserError: A number is out of range.
    """

    seed: int = field(default=0, metadata={"help": "draws the projector, the pictures and their order"})
    image_size: int = field(
        default=112, metadata={"help": f"pixels of an image's side, a multiple of {PATCH}: a patch of them is a token"}
    )
    steps: int = field(default=160, metadata={"help": "updates of the alignment; 0 leaves the projector random"})
    lesions: int = field(default=700, metadata={"help": "synthetic lesions to describe, which name no disease"})
    pictures: int = field(default=300, metadata={"help": "plain pictures to describe: coloured shapes"})
    labelled: int = field(default=98, metadata={"help": "further lesions, with reasoning and the disease's name"})
    word_epochs: int = field(default=30, metadata={"help": "passes of the projector's first step over all images"})
    measured: int = field(default=42, metadata={"help": "held-out lesions, and as many pictures, to measure; 0: none"})

    def __post_init__(self) -> None:
        if self.image_size % PATCH or not PATCH * 2 <= self.image_size <= LARGEST_IMAGE:
            raise UserError(
                f"image_size={self.image_size} must be a multiple of {PATCH}, the side of DINOv2's patches, from "
                f"{PATCH * 2} to {LARGEST_IMAGE}. 112 makes 64 tokens of an image, 84 makes 36."
            )
        _check_range("steps", self.steps, 0, 100_000)
        for name in ("lesions", "pictures", "labelled", "measured"):
            _check_range(name, getattr(self, name), 0, 20_000)
        _check_range("word_epochs", self.word_epochs, 0, 1000)
        if self.steps and not self.lesions + self.pictures + self.labelled:
            raise UserError(
                f"steps={self.steps} with lesions=0, pictures=0 and labelled=0: there would be nothing to learn from. "
                "Raise one of them, or set steps=0."
            )
        _check_range("seed", self.seed, 0, 2**30)

    @property
    def folder(self) -> Path:
        """Its place in the cache; the default recipe has that which `pretrained: smollm2-dinov2` means."""
        default = cache_dir() / MADE[NAME].folder
        if self == Recipe():
            return default
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return default.with_name(f"{default.name}-{key}")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"{name}={value} is out of range: allowed are {low} to {high}.")
