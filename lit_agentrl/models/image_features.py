"""Images through a model's vision tower, and the features as its own forward takes them instead of pixels.

Legend: F features: the placeholders of all images, one after another; D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.vision_families import VisionFamily


def image_model(lm: nn.Module) -> PreTrainedModel:
    """The model inside `lm` without its head: token ids and encoded images to final hidden states.

    Raises:
        UserError: if its forward does not take encoded images.
    """
    model = cast(PreTrainedModel, base_lm(lm).base_model)
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise UserError(
            f"transformers {transformers.__version__}: its {type(model).__name__} does not take encoded "
            "images (`mm_encoder_outputs`); 5.23 does. Upgrade transformers, or use text-only rows."
        )
    return model


def encode_images(
    model: PreTrainedModel, family: VisionFamily, pixels: Mapping[str, list[Tensor]], num_tokens: Sequence[int]
) -> list[Tensor]:
    """The features of images, [F, D] each: what replaces the placeholders, then what each DeepStack layer adds.

    Args:
        model: what `image_model` gives.
        family: of the model.
        pixels: processor outputs by name, one tensor an image.
        num_tokens: the placeholders that each image fills, F together.

    Raises:
        UserError: for a model that makes another number of features.
    """
    output = model.get_image_features(**family.joined(pixels), return_dict=True)  # type: ignore[operator]
    layers = [output.pooler_output, *(output.get("deepstack_features") or ())]
    features = [torch.cat([image.flatten(0, -2) for image in layer]) for layer in layers]
    if len(features[0]) != sum(num_tokens):
        raise UserError(
            f"{type(model).__name__} made {len(features[0])} features of images that fill {sum(num_tokens)} "
            "placeholders: its way to select features is not supported."
        )
    return features


def encoder_output(features: Sequence[Tensor], family: VisionFamily) -> Any:
    """`features`, [n, D] each as `encode_images` orders them, one a placeholder: the model's `mm_encoder_outputs`."""
    pooled, *deepstack = features
    output = BaseModelOutputWithPooling(pooler_output=(pooled,) if family.is_causal else pooled)  # type: ignore[arg-type]
    if deepstack:
        output.deepstack_features = [(layer,) for layer in deepstack]  # type: ignore[attr-defined]
    return {"image": output}
