"""What the rest of the package says of images: files by reference, or arrays that an environment drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A file by path and content: what travels through rollouts, rows and checkpoints instead of its pixels."""

    path: str
    sha256: str
    """Of the file's bytes, 64 hexadecimal digits."""
    crop: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom as shares of width and height: only this part, scaled back to the whole's size."""


Image = ImageRef | np.ndarray[Any, np.dtype[np.uint8]]
"""A file, or pixels [H, W, 3]."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a model takes it."""

    key: int
    """63 bits that depend on the image's content and its processing alone."""
    text: str
    """What stands for it in a rendered prompt: the model's placeholder once per feature, and what goes around."""
    pixels: Mapping[str, Tensor]
    """What the model's image processor gives for this image alone (`pixel_values`, `image_grid_thw`, ...)."""


class RowImages(Protocol):
    """The images of a batch of rows (`models.vision.VisionInputs`)."""

    shown: list[list[int]]
    """[B], which of the unique images each row shows, in order."""

    def keys(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, L], what decides whether two tokens are the same: an image's content where a placeholder stands."""
        ...


class ImageReader(Protocol):
    """Turns images into what one model takes (`models.image_reader`)."""

    placeholder: str
    """The text of the token that the model's chat template writes for an image."""
    image_token_id: int
    """The token whose embeddings the image's features replace."""

    def read(self, image: Image) -> Picture:
        """Decode and process an image; an image that was read lately is not read again."""
        ...

    def inputs(self, images: Sequence[Sequence[Image]], token_ids: Tensor, lengths: Tensor) -> RowImages | None:
        """The images [B] of right-padded rows [B, L]; None where no row shows one."""
        ...


def same_images(some: Sequence[Image], others: Sequence[Image]) -> bool:
    """Whether both are the same images in the same order: one file, or equal pixels."""
    return len(some) == len(others) and all(map(_is_same, some, others))


def _is_same(one: Image, other: Image) -> bool:
    if isinstance(one, ImageRef) or isinstance(other, ImageRef):
        return one is other or (isinstance(one, ImageRef) and isinstance(other, ImageRef) and one == other)
    return one is other or np.array_equal(one, other)
