"""Policies without weights: the modules of the real one, on tensors that have a shape and a type and hold nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lit_agentrl.models.quantized import quantization_options
from lit_agentrl.models.vision_families import has_vision

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

BLOCK, BLOCKS = 64, 256
"""Weights that share a scale of 8 bits, and scales that share one of 32, in bitsandbytes' double quantisation."""
TABLES = 4 * (16 + 256 + 1)
"""Bytes of what a quantised layer keeps beside: both tables of values, and an offset."""


def fill(lm: nn.Module) -> None:
    """Give weights and buffers of a `meta` model fake storages on the CPU, whose bytes count; ties stay."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[nn.Parameter, nn.Parameter] = {}
    with mode:
        for module in lm.modules():
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if weight not in made:
                    empty = torch.empty_like(weight, device="cpu")
                    made[weight] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                module.register_parameter(name, made[weight])
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))


def fake_mode(lm: nn.Module) -> FakeTensorMode:
    """What the weights of a filled model belong to."""
    weight = next(lm.parameters())
    found = getattr(weight.to_local() if isinstance(weight, DTensor) else weight, "fake_mode", None)
    assert isinstance(found, FakeTensorMode), "fill the model first"
    return found


def quantized_bytes(weight: Tensor) -> int:
    """What bitsandbytes keeps of a weight in 4 bits with doubly quantised scales."""
    blocks = math.ceil(weight.numel() / BLOCK)
    return math.ceil(weight.numel() / 2) + blocks + 4 * math.ceil(blocks / BLOCKS) + TABLES


class Blank4Bit(nn.Linear):
    """A linear layer of 4-bit weights: it holds their bytes, and a whole copy of them while it computes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        packed = torch.empty(quantized_bytes(linear.weight), dtype=torch.uint8, device="meta")
        self.dtype = linear.weight.dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """As bitsandbytes does it: dequantise for the product, here and again in the backward pass."""
        out: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias

    def dequantized(self, like: Tensor) -> Tensor:
        """[out, in], in the type that products are computed in."""
        return like.new_empty(self.out_features, self.in_features, dtype=self.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: Blank4Bit) -> Tensor:
        ctx.layer = layer
        return F.linear(hidden, layer.dequantized(hidden).to(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.dequantized(grad).to(grad.dtype), None


def quantizer(config: PreTrainedConfig, dtype: str) -> Callable[[PreTrainedModel], None]:
    """What puts `Blank4Bit` in the place of the layers that `quantize: nf4` would hold in 4 bits."""
    loader: Any = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    kept = quantization_options(config, dtype, loader)["llm_int8_skip_modules"]

    def replace(lm: PreTrainedModel) -> None:
        for name, module in list(lm.named_modules()):
            if isinstance(module, nn.Linear) and not any(name == k or name.startswith(f"{k}.") for k in kept):
                parent, _, own = name.rpartition(".")
                setattr(lm.get_submodule(parent), own, Blank4Bit(module))

    return replace
