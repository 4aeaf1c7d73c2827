"""Frozen weights in 4 bits under an adapter (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import BitsAndBytesConfig

from lit_agentrl.errors import missing_extra
from lit_agentrl.models.vision_parts import Parts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

Quantize = Literal["none", "nf4"]


def quantization_config(config: PreTrainedConfig, dtype: str, loader: Any) -> BitsAndBytesConfig:
    """What transformers is told of the quantisation.

    Args:
        config: The model's configuration.
        dtype: What products are computed in.
        loader: The auto class that will load the model.

    Raises:
        UserError: bitsandbytes or accelerate is not installed.
    """
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "qlora", "quantize='nf4'")
    return BitsAndBytesConfig(**quantization_options(config, dtype, loader))  # type: ignore[no-untyped-call]


def quantization_options(config: PreTrainedConfig, dtype: str, loader: Any) -> dict[str, Any]:
    """4 bits by quantiles of a normal distribution, their scales quantised too, products in `dtype`.

    Left as they are: the head, whose log-probabilities are trained on, and all that sees (small, and sensitive).
    """
    with torch.device("meta"):
        parts = Parts(loader.from_config(config))
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": getattr(torch, dtype),
        "llm_int8_skip_modules": [name for name in (parts.head, *parts.seeing) if name],
    }


def is_quantized(lm: nn.Module) -> bool:
    """Whether layers of `lm` hold quantised weights, to which no update can be added."""
    return any(not weight.is_floating_point() for weight in lm.parameters())


def keep_gradients(lm: nn.Module) -> None:
    """Keep bitsandbytes from packing weights into a form without a backward pass.

    Version 0.50 does so on CPUs with AVX512-BF16, in the first forward in `eval()`, the mode that a policy is always
    in: all gradients below the layer would silently be lost.
    """
    for module in lm.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
