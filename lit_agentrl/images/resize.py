"""What size pictures have before a model's own processor sees them: what an image costs in tokens is decided here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image as pil

from lit_agentrl.errors import UserError
from lit_agentrl.images.files import MAX_PIXELS


@dataclass(frozen=True)
class Resize:
    """How pictures are resized before the model's own processor, which then does what it always does.

    Args:
        mode: `none` leaves them. `fit` shrinks those that are too large and keeps their shape. `pad` scales the longest
            side to `size` and puts the picture in the midst of a square. `squash` scales both sides to `size`.
        size: Pixels: the longest side at most (`fit`), or the side of the square (`pad`, `squash`).
        max_pixels: `fit` only: width x height at most, beside `size` or without it.
        fill: `pad` only: the grey around the picture, 0 (black) to 255 (white).
        refuse_above: Pixels of an image as it comes; one with more is refused before it is decoded.

    Raises:
        UserError: A size that is missing, or has no meaning for the mode.
    """

    mode: Literal["none", "fit", "pad", "squash"] = "none"
    size: int | None = None
    max_pixels: int | None = None
    fill: int = 0
    refuse_above: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.mode not in ("none", "fit", "pad", "squash"):
            raise UserError(f"resize: mode={self.mode!r} must be none, fit, pad or squash.")
        if any(value is not None and value < 1 for value in (self.size, self.max_pixels, self.refuse_above)):
            raise UserError(f"resize: sizes must be at least 1 pixel: {self}.")
        if not 0 <= self.fill <= 255:
            raise UserError(f"resize: fill={self.fill} must be from 0 (black) to 255 (white).")
        if self.mode == "none" and (self.size or self.max_pixels):
            raise UserError("resize: mode='none' resizes nothing. Choose fit, pad or squash, or leave the sizes out.")
        if self.mode == "fit" and not (self.size or self.max_pixels):
            raise UserError("resize: mode='fit' needs `size` (the longest side), `max_pixels`, or both.")
        if self.mode in ("pad", "squash") and (not self.size or self.max_pixels):
            raise UserError(f"resize: mode={self.mode!r} needs `size`, the side of the square, and no `max_pixels`.")

    def __call__(self, picture: pil.Image) -> pil.Image:
        """The picture in the size that this says."""
        if self.mode == "none":
            return picture
        if self.mode == "squash":
            assert self.size is not None, "checked in __post_init__"
            return _scaled(picture, self.size, self.size)
        width, height = self._fitting(*picture.size)
        picture = _scaled(picture, width, height)
        if self.mode == "fit":
            return picture
        assert self.size is not None, "checked in __post_init__"
        square = pil.new("RGB", (self.size, self.size), (self.fill,) * 3)
        square.paste(picture, ((self.size - width) // 2, (self.size - height) // 2))
        return square

    def _fitting(self, width: int, height: int) -> tuple[int, int]:
        """The size with the same shape that fits: scaled up too where it is to be padded, never in `fit`."""
        scales = [self.size / max(width, height)] if self.size else []
        if self.mode == "fit":
            scales.append(1.0)
        if self.max_pixels:
            scales.append((self.max_pixels / (width * height)) ** 0.5)
        scale = min(scales)
        if self.max_pixels is None:
            return max(1, round(width * scale)), max(1, round(height * scale))
        # cut, so that the area is never above the limit; 1e-9, so that 99.999... is 100
        return max(1, int(width * scale + 1e-9)), max(1, int(height * scale + 1e-9))


def _scaled(picture: pil.Image, width: int, height: int) -> pil.Image:
    return picture if picture.size == (width, height) else picture.resize((width, height), pil.Resampling.BICUBIC)
