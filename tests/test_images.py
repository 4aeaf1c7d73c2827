"""Files and arrays become upright RGB pictures; what is broken, huge or no image is refused in words."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageRef, Resize, content_key, decode, image_ref

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # Pillow's own words on broken TIFF and EXIF data
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = pil.fromarray(NOISE)


def saved(path: Path, picture: pil.Image = PICTURE, **options: object) -> ImageRef:
    picture.save(path, **options)
    return image_ref(path)


def pixels(image: ImageRef | np.ndarray, **options: object) -> np.ndarray:
    picture = decode(image, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


# --- references -------------------------------------------------------------------------------------------------------


def test_a_reference_is_the_file_by_name_and_content(tmp_path, monkeypatch):
    """Absolute, as workers may run in other folders; equal content has one key wherever it lies."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    ref = image_ref("a.png")
    assert ref.path == str(tmp_path / "a.png")
    assert pickle.loads(pickle.dumps(ref)) == ref
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    other = saved(tmp_path / "c.png", pil.fromarray(NOISE[::-1]))
    assert content_key(ref) == content_key(image_ref("b.png")) != content_key(other)
    assert content_key(ref) != content_key(image_ref("a.png", crop=(0, 0, 0.5, 1)))
    assert content_key(NOISE) == content_key(np.asfortranarray(NOISE)) != content_key(NOISE.reshape(30, 20, 3))


def test_a_file_that_changed_since_it_was_hashed_is_refused(tmp_path):
    ref = saved(tmp_path / "a.png")
    pil.fromarray(NOISE[::-1]).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"not the one it was: its SHA-256 was {ref.sha256[:16]}"):
        decode(ref)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="no image file"):
        decode(ref)


@pytest.mark.parametrize(
    "crop", [(0.5, 0, 0.5, 1), (0, 0.2, 1, 0.1), (-0.1, 0, 1, 1), (0, 0, 1, 1.5), (0, 0, float("nan"), 1)]
)
def test_a_crop_must_be_part_of_the_image(tmp_path, crop):
    ref = saved(tmp_path / "a.png")
    with pytest.raises(UserError, match="must be shares from 0 to 1"):
        image_ref(ref.path, crop)
    with pytest.raises(UserError, match="must be shares from 0 to 1"):
        decode(ImageRef(ref.path, ref.sha256, crop))


def test_a_crop_has_the_size_of_the_whole(tmp_path):
    """The right half, twice as wide: two flat colours stay flat."""
    two = np.zeros((20, 30, 3), np.uint8)
    two[:, 15:] = (200, 100, 50)
    ref = saved(tmp_path / "a.png", pil.fromarray(two))
    right = pixels(image_ref(ref.path, (0.5, 0, 1, 1)))
    assert right.shape == (20, 30, 3)
    assert (right == (200, 100, 50)).all()


# --- odd files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm"])
def test_formats_without_loss_give_the_pixels(tmp_path, name):
    assert (pixels(saved(tmp_path / name)) == NOISE).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_formats_with_loss_give_nearly_the_pixels(tmp_path, name):
    flat = pil.new("RGB", (30, 20), (200, 100, 50))
    assert np.abs(pixels(saved(tmp_path / name, flat)).astype(int) - (200, 100, 50)).max() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    """Grey 0, 128 and 255, whatever it is held as."""
    levels = np.array([[0, 255]] if mode == "1" else [[0, 128, 255]], np.uint8)
    if mode == "I;16":
        picture = pil.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16))
    else:
        grey = pil.fromarray(levels)
        picture = grey.convert(mode) if mode in ("L", "P") else grey.convert("RGB").convert(mode)
    ref = saved(tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"), picture)
    with pil.open(ref.path) as held:
        assert held.mode == mode or (mode, held.mode) == ("YCbCr", "RGB")
    notes: Counter[str] = Counter()
    found = pixels(ref, notes=notes)
    assert np.abs(found[0, :, 0].astype(int) - levels[0]).max() <= 1
    assert (found == found[..., :1]).all()
    assert dict(notes) == ({"CMYK": 1} if mode == "CMYK" else {"16 bits": 1} if mode == "I;16" else {})


def test_cmyk_jpeg(tmp_path):
    flat = pil.new("RGB", (32, 32), (200, 100, 50)).convert("CMYK")
    assert np.abs(pixels(saved(tmp_path / "a.jpg", flat)).astype(int) - (200, 100, 50)).max() < 6


def test_32_bit_numbers_have_no_known_range(tmp_path):
    small = saved(tmp_path / "a.tif", pil.fromarray(np.array([[0, 65535]], np.int32)))
    assert pixels(small)[0, :, 0].tolist() == [0, 255]
    with pytest.raises(UserError, match="integers from -1 to 70000"):
        decode(saved(tmp_path / "b.tif", pil.fromarray(np.array([[-1, 70000]], np.int32))))
    with pytest.raises(UserError, match="floating-point"):
        decode(saved(tmp_path / "c.tif", pil.fromarray(np.array([[0.0, 1.0]], np.float32))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 255, 128
    picture = pil.fromarray(rgba)
    if mode == "P":  # a palette whose colour 0 is clear
        picture = pil.fromarray(np.array([[0, 1, 1]], np.uint8)).convert("P")
        picture.putpalette([90, 90, 90, 0, 0, 0])
        picture.info["transparency"] = 0
    ref = saved(tmp_path / "a.png", picture.convert(mode))
    notes: Counter[str] = Counter()
    found = pixels(ref, notes=notes)[0, :, 0].tolist()
    assert found == ([255, 0, 0] if mode == "P" else [255, 0, 127])
    assert notes == {"transparent": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    """The camera wrote what `lying` is and how to turn it: all eight give the same picture."""
    lying = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](NOISE)
    exif = pil.Exif()
    exif[0x0112] = orientation
    ref = saved(tmp_path / "a.png", pil.fromarray(np.ascontiguousarray(lying)), exif=exif)
    assert (pixels(ref) == NOISE).all()


def test_broken_exif_costs_the_turning_alone(tmp_path, caplog):
    ref = saved(tmp_path / "a.png", exif=b"Exif\x00\x00XX*\x00\x08\x00\x00\x00\xff\xff")
    notes: Counter[str] = Counter()
    assert (pixels(ref, notes=notes) == NOISE).all()
    assert notes == {"broken EXIF": 1}
    assert "taken as it lies" in caplog.text


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_frame_is_taken_and_said_once(tmp_path, caplog, name):
    red, blue = (pil.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if name == "a.webp" else {}
    ref = saved(tmp_path / name, red, save_all=True, append_images=[blue], **options)
    notes: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (pixels(ref, notes=notes) == (255, 0, 0)).all()
    assert caplog.text.count("several frames") == 1
    assert notes["several frames"] == 3


# --- hostile files ----------------------------------------------------------------------------------------------------


def test_files_that_are_no_image(tmp_path):
    text = tmp_path / "a.jpg"
    text.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(UserError, match=r"is no image that can be read: it starts with b'<html>40'"):
        decode(image_ref(text))
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(UserError, match="empty"):
        image_ref(empty)
    with pytest.raises(UserError, match="empty"):
        decode(ImageRef(str(empty), "0" * 64))
    for missing in (tmp_path, tmp_path / "none.png", Path("/dev/zero")):
        with pytest.raises(UserError, match="no image file"):
            image_ref(missing)


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="no image that can be read"):
        decode(image_ref(tmp_path / "a.png"))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path, name, share):
    saved(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"damaged|no image that can be read"):
        decode(image_ref(tmp_path / name))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif"])
def test_random_damage_raises_nothing_but_user_errors(tmp_path, name):
    """Some of it cannot be seen (a changed pixel); the rest is told in words."""
    saved(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            broken[place] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(broken)
        with contextlib.suppress(UserError):
            decode(image_ref(tmp_path / name), max_pixels=1_000_000)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says to be so large, with a compressed row of nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 6_000), (20_000, 10_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_of_too_many_pixels_is_enough(tmp_path, size):
    """60, 200 and 3600 million: above the limit, and above those at which Pillow warns and refuses."""
    (tmp_path / "big.png").write_bytes(png_of(*size))
    with pytest.raises(UserError, match="Shrink it"):
        decode(image_ref(tmp_path / "big.png"))


def test_the_limit_is_the_callers(tmp_path):
    ref = saved(tmp_path / "a.png")
    assert decode(ref, max_pixels=600).size == (30, 20)
    with pytest.raises(UserError, match=r"a.png \(30 x 20\) has 0.0 million pixels, the limit is 0.000599 million"):
        decode(ref, max_pixels=599)
    with pytest.raises(UserError, match="the limit is"):
        decode(NOISE, max_pixels=599)


@pytest.mark.slow
def test_200_megapixels_are_refused_in_little_memory(tmp_path):
    """A real file of 200 million pixels: 600 MB as RGB. The process that refuses it stays below a tenth of that."""
    pil.new("RGB", (20_000, 10_000), (200, 100, 50)).save(tmp_path / "big.jpg", quality=20)
    code = (
        "import resource, sys\n"
        "from lit_agentrl.errors import UserError\n"
        "from lit_agentrl.images import decode, image_ref\n"
        "ref = image_ref(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    decode(ref)\n"
        "except UserError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.jpg")], capture_output=True, text=True, check=True
    )
    message, grown = done.stdout.splitlines()
    assert "200.0 million pixels" in message or "200000000 pixels" in message
    assert int(grown) < 60_000  # kilobytes


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_arrays_are_taken_as_they_are():
    assert (pixels(NOISE) == NOISE).all()
    assert (pixels(NOISE[::-1, ::2]) == NOISE[::-1, ::2]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        NOISE[..., 0],
        NOISE.transpose(2, 0, 1),
        NOISE.astype(np.float32) / 255,
        NOISE[..., :2],
        NOISE[:0],
        np.concatenate([NOISE, NOISE[..., :1]], 2),
    ],
)
def test_arrays_that_are_no_images(wrong):
    for use in (decode, content_key):
        with pytest.raises(UserError, match=r"must be uint8 \[height, width, 3\], but this is"):
            use(wrong)


def test_what_is_neither_file_nor_array():
    for wrong in ("a.png", PICTURE, NOISE.tolist()):
        with pytest.raises(UserError, match="must be an ImageRef or an array, not"):
            decode(wrong)


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        (Resize(), (300, 200), (300, 200)),
        (Resize("fit", size=100), (300, 200), (100, 67)),
        (Resize("fit", size=100), (90, 20), (90, 20)),  # never larger than it came
        (Resize("fit", size=100), (300, 1), (100, 1)),
        (Resize("fit", max_pixels=15_000), (300, 200), (150, 100)),
        (Resize("fit", max_pixels=10_000), (300, 200), (122, 81)),  # 9882: never above
        (Resize("fit", size=100, max_pixels=15_000), (300, 200), (100, 66)),
        (Resize("pad", size=100), (30, 20), (100, 100)),
        (Resize("squash", size=112), (300, 200), (112, 112)),
    ],
)
def test_sizes(resize, size, expected):
    assert resize(pil.new("RGB", size)).size == expected


def test_padding_surrounds_the_picture():
    padded = np.asarray(Resize("pad", size=60, fill=7)(pil.new("RGB", (30, 20), "white")))
    assert (padded[10:50] == 255).all()
    assert (padded[:10] == 7).all()
    assert (padded[50:] == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "stretch"}, "must be none, fit, pad or squash"),
        ({"mode": "fit"}, "needs `size`"),
        ({"mode": "pad"}, "needs `size`, the side"),
        ({"mode": "squash", "size": 8, "max_pixels": 9}, "no `max_pixels`"),
        ({"size": 8}, "resizes nothing"),
        ({"mode": "fit", "size": 0}, "at least 1 pixel"),
        ({"fill": 256}, "fill=256"),
    ],
)
def test_resizing_that_says_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Resize(**options)


def test_a_large_picture_becomes_small_before_anything_else_sees_it():
    buffer = io.BytesIO()
    Resize("fit", size=64)(decode(np.zeros((2000, 3000, 3), np.uint8))).save(buffer, "BMP")
    assert buffer.tell() < 64 * 43 * 3 + 200
