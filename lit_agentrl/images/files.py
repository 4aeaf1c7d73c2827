"""From files and arrays to upright RGB pictures: what is odd is put right and counted, the broken and huge is refused.

Colours are taken as they are stored: colour profiles are not applied, and CMYK is converted by the plain formula.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image as pil
from PIL import ImageOps, UnidentifiedImageError

from lit_agentrl.errors import ImageError, UserError
from lit_agentrl.images.base import Image, ImageRef

MAX_PIXELS = 50_000_000
"""What is decoded at most: 200 MB as Pillow holds it, several times that on the way to RGB."""
MAX_BYTES = 512 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is opened. The others are not tried: Pillow has Ghostscript run an EPS file, for one."""
_HOW_TO_SHRINK = "Shrink it (`magick big.jpg -resize 2000x2000 small.jpg`, say), or raise the limit (`refuse_above`)."
_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")

log = logging.getLogger(__name__)


def image_ref(path: str | Path, crop: tuple[float, float, float, float] | None = None) -> ImageRef:
    """The reference to an image file: its absolute path, as workers may run elsewhere, and the hash of its bytes.

    Args:
        path: A file.
        crop: Left, top, right and bottom as shares of width and height, see `ImageRef.crop`.

    Raises:
        ImageError: There is no such file, or it is empty or cannot be read.
        UserError: The crop is no part of an image.
    """
    file = Path(path).expanduser().absolute()
    _check_crop(crop, str(file))
    _check_file(file)
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"The image {file} cannot be read: {error.strerror}.") from error
    return ImageRef(str(file), digest, crop)


def content_key(image: Image) -> str:
    """64 hexadecimal digits that depend on the image's content alone, not on where its file lies.

    Raises:
        UserError: The array is no image.
    """
    if isinstance(image, ImageRef):
        return hashlib.sha256(f"file {image.sha256} {image.crop}".encode()).hexdigest()
    _check_array(image)
    digest = hashlib.sha256(f"array {image.shape} ".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def decode(image: Image, max_pixels: int = MAX_PIXELS, notes: Counter[str] | None = None) -> pil.Image:
    """The picture in RGB with 8 bits, upright, of its own size.

    A file is turned as its EXIF data say, transparent parts are put on white, 16 bits become 8, and of several frames
    the first is taken. A crop is scaled back to the size of the whole. How large a picture is stands in its header, so
    a picture of too many pixels is refused before anything of it is decoded.

    Args:
        image: A file by reference, or an array [H, W, 3].
        max_pixels: Of the whole picture, the most that are decoded.
        notes: Counts what was put right (`several frames`, `transparent`, `16 bits`, `CMYK`).

    Raises:
        ImageError: The file is missing, empty, no image, damaged, too large or another one than when it was hashed.
        UserError: The array or the crop is none.
    """
    if not isinstance(image, ImageRef):
        _check_array(image)
        if image.shape[0] * image.shape[1] > max_pixels:
            _refuse_size(f"An image array of shape {image.shape}", image.shape[0] * image.shape[1], max_pixels)
        return pil.fromarray(np.ascontiguousarray(image))
    _check_crop(image.crop, image.path)
    data = _read(image)
    notes = Counter() if notes is None else notes
    with _opened(data, image.path, max_pixels) as picture:
        try:
            whole = _upright_rgb(picture, image.path, notes)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
            raise ImageError(
                f"The image {image.path} is damaged ({picture.format}, {picture.width} x {picture.height}): {error}. "
                "Was the download cut? Fetch it anew, or leave it out."
            ) from error
    return whole if image.crop is None else _cropped(whole, image.crop)


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise ImageError(f"There is no image file {file}.")
    size = file.stat().st_size
    if size == 0:
        raise ImageError(f"The image {file} is empty (0 bytes). Fetch it anew, or leave it out.")
    if size > MAX_BYTES:
        raise ImageError(f"The image {file} has {size:,} bytes, the most is {MAX_BYTES:,}. Is it an image at all?")


def _read(ref: ImageRef) -> bytes:
    """The bytes that the reference's hash is of."""
    file = Path(ref.path)
    _check_file(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ImageError(f"The image {file} cannot be read: {error.strerror}.") from error
    if (digest := hashlib.sha256(data).hexdigest()) != ref.sha256:
        raise ImageError(
            f"The image {file} is not the one it was: its SHA-256 was {ref.sha256[:16]}..., now it is {digest[:16]}... "
            "Put the old file back, or start from references made anew."
        )
    return data


def _opened(data: bytes, path: str, max_pixels: int) -> pil.Image:
    """The picture with its header read and checked, its pixels not yet decoded."""
    pil.init()
    try:
        picture = pil.open(io.BytesIO(data), formats=[name for name in FORMATS if name in pil.OPEN])
    except UnidentifiedImageError as error:
        raise ImageError(
            f"The file {path} is no image that can be read: it starts with {data[:8]!r}. Formats that can are "
            f"{', '.join(FORMATS)}."
        ) from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:  # a filter may raise the warning
        raise ImageError(f"The image {path} is refused: {error} {_HOW_TO_SHRINK}") from error
    except Exception as error:  # see decode
        raise ImageError(f"The image {path} is damaged: its header cannot be read. {error}") from error
    width, height = picture.size
    if width * height > max_pixels:
        _refuse_size(f"The image {path} ({width} x {height})", width * height, max_pixels)
    return picture


def _refuse_size(what: str, pixels: int, max_pixels: int) -> NoReturn:
    raise ImageError(
        f"{what} has {pixels / 1e6:.1f} million pixels, the limit is {max_pixels / 1e6:g} million. {_HOW_TO_SHRINK}"
    )


def _upright_rgb(picture: pil.Image, path: str, notes: Counter[str]) -> pil.Image:
    # a phone's MPO holds previews beside its picture, which is the first
    if picture.format != "MPO" and getattr(picture, "is_animated", False):  # formats without frames lack it
        notes["several frames"] += 1
        if notes["several frames"] == 1:
            log.warning("%s has several frames: the first is taken, of it and of all others like it.", path)
    picture.load()
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # see decode; the pixels are whole all the same
        notes["broken EXIF"] += 1
        log.warning("%s has EXIF data that cannot be read (%s): it is taken as it lies.", path, error)
    if picture.mode in _GREY_16:
        notes["16 bits"] += 1
        return _from_16_bits(picture, path)
    if picture.mode == "F":
        raise ImageError(f"The image {path} holds floating-point numbers, whose range is not known. Save it as 8 bits.")
    if picture.has_transparency_data:
        notes["transparent"] += 1
        rgba = picture.convert("RGBA")
        whole = pil.new("RGB", rgba.size, "white")
        whole.paste(rgba, mask=rgba.getchannel("A"))
        return whole
    if picture.mode == "CMYK":
        notes["CMYK"] += 1
    return picture.convert("RGB")


def _from_16_bits(picture: pil.Image, path: str) -> pil.Image:
    """Grey of 16 bits, 65535 to 255; Pillow's own conversion would clip all above 255."""
    values = np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"The image {path} holds integers from {low} to {high}, whose range is not known. Save it as 8 bits."
        )
    return pil.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _cropped(picture: pil.Image, crop: tuple[float, float, float, float]) -> pil.Image:
    width, height = picture.size
    left, top = min(width - 1, round(crop[0] * width)), min(height - 1, round(crop[1] * height))
    right, bottom = max(left + 1, round(crop[2] * width)), max(top + 1, round(crop[3] * height))
    # cut out first: `resize(box=...)` would let the surroundings shine in at the edges
    return picture.crop((left, top, right, bottom)).resize(picture.size, pil.Resampling.BICUBIC)


def _check_crop(crop: tuple[float, float, float, float] | None, path: str) -> None:
    if crop is None:
        return
    left, top, right, bottom = crop
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(
            f"The image {path} is to be cropped to {crop}: left < right and top < bottom must be shares from 0 to 1."
        )


def _check_array(image: Any) -> None:
    if not isinstance(image, np.ndarray):
        raise UserError(f"An image must be an ImageRef or an array, not {type(image).__name__}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(
            f"An image array must be uint8 [height, width, 3], but this is {image.dtype} {list(image.shape)}."
        )
