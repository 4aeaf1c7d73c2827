"""Images as preference files name them: by path and content."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.files import replace_atomically
from lit_agentrl.images import Image, ImageRef


def image_records(images: Sequence[Image], folder: Path) -> list[dict[str, str]]:
    """`{"path", "sha256"}` of each; pixels that an environment drew are written to `folder`/images first.

    Paths below `folder` are relative to it, so that it can be moved as a whole.

    Raises:
        UserError: An image is a part of a file.
    """
    return [_record(image, folder) for image in images]


def _record(image: Image, folder: Path) -> dict[str, str]:
    if isinstance(image, np.ndarray):
        return _written(image, folder)
    assert isinstance(image, ImageRef)
    if image.crop is not None:
        raise UserError(f"{image.path}: a preference file names whole images, and this one is a crop.")
    path = Path(image.path).absolute()
    inside = path.is_relative_to(folder.absolute())
    return {"path": str(path.relative_to(folder.absolute()) if inside else path), "sha256": image.sha256}


def _written(pixels: np.ndarray, folder: Path) -> dict[str, str]:  # type: ignore[type-arg]
    """A PNG file named after its content."""
    try:
        from PIL import Image as Pillow
    except ImportError:
        raise missing_extra("pillow", "vision", "Writing the images that an environment drew") from None
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, format="png")
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    path = folder / "images" / f"{sha256[:32]}.png"
    if not path.exists():
        replace_atomically(path, lambda file: file.write(data))
    return {"path": str(path.relative_to(folder)), "sha256": sha256}
