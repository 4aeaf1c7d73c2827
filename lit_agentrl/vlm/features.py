"""Images through the frozen encoder, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

CHUNK = 32


@torch.no_grad()
def encode(
    vlm: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
) -> Tensor:
    """[N, P, D] bfloat16: patches as the projector takes them, whatever it is then."""
    kept: list[Tensor] = []
    projector = vlm.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].bfloat16()))
    try:
        for start in range(0, len(images), CHUNK):
            pixels = processor.image_processor(images=list(images[start : start + CHUNK]), return_tensors="pt")
            vlm.model.get_image_features(pixel_values=pixels["pixel_values"])
    finally:
        hook.remove()
    return torch.cat(kept)
