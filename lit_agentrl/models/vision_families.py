"""The vision-language models whose images a forward of our own can place, and what each family wants to know of them.

One entry a family, keyed by the `model_type` of its configuration. A family that is not listed here is refused for rows
with images: how it counts placeholders, places them, or lets them see one another is not known.

Legend: C tiles of one image (Idefics3 cuts large images into several), P patches, D values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lit_agentrl.errors import UserError

Pixels = dict[str, Tensor]
"""What an image processor makes of one image, by name."""


@dataclass(frozen=True)
class VisionFamily:
    """How the models of one family take images."""

    count: Callable[[Any, Pixels], int]
    """The placeholder tokens that one image fills, from the model's configuration and the image's pixels."""
    names: tuple[str, ...] = ("pixel_values",)
    """Processor outputs that every image needs."""
    optional: tuple[str, ...] = ()
    """Processor outputs that an image may have."""
    has_grid: bool = False
    """Whether patches are one flat list with a grid beside it, and positions are [3, ...] (time, height, width)."""
    has_row_dimension: bool = False
    """Whether pixels are [rows, images, ...] rather than [images, ...]."""
    connector: tuple[str, ...] = ("model.multi_modal_projector",)
    """The names of what turns the tower's features into embeddings."""
    is_causal: bool = True
    """Whether image tokens see only what comes before them; if not, a prefix tree is wrong for rows with images."""

    def normal(self, image: Mapping[str, Tensor]) -> Pixels:
        """The pixels of one image in one form, whether or not its processor put batch dimensions in front.

        `pixel_values` [P, D] with `image_grid_thw` [1, 3], or [C, 3, H, W] with `pixel_attention_mask` [C, H, W].

        Raises:
            UserError: for names that are missing or not known to the family, and for patches that do not fit the grid.
        """
        if missing := set(self.names) - set(image):
            raise UserError(f"An image without {sorted(missing)}: this model's images need {list(self.names)}.")
        if unknown := set(image) - set(self.names) - set(self.optional):
            raise UserError(
                f"An image with {sorted(unknown)}: this model's images take {[*self.names, *self.optional]} only."
            )
        if self.has_grid:
            values, grid = image["pixel_values"].flatten(0, -2), image["image_grid_thw"].reshape(-1, 3)
            if len(grid) != 1 or int(grid.prod()) != len(values):
                raise UserError(
                    f"An image with {len(values)} patches and the grids {grid.tolist()}: expected one grid of as many "
                    "patches. Process images one at a time."
                )
            return {"pixel_values": values, "image_grid_thw": grid}
        pixels = {"pixel_values": image["pixel_values"].flatten(0, -4)}
        if "pixel_attention_mask" in image:
            pixels["pixel_attention_mask"] = image["pixel_attention_mask"].flatten(0, -3)
        return pixels

    def joined(self, pixels: Mapping[str, list[Tensor]]) -> Pixels:
        """The pixels of several images the way `get_image_features` takes them.

        Raises:
            UserError: for images of different sizes where the model needs one.
        """
        if not self.has_grid and len(sizes := {tuple(value.shape[1:]) for value in pixels["pixel_values"]}) > 1:
            raise UserError(
                f"Images of {len(sizes)} sizes, {sorted(sizes)}: this model takes one size at a time. Let its image "
                "processor resize them, or pad to a fixed size with a mask."
            )
        whole = {name: torch.cat(values) for name, values in pixels.items()}
        return {name: value[None] for name, value in whole.items()} if self.has_row_dimension else whole


def _merged_patches(config: Any, pixels: Pixels) -> int:
    return len(pixels["pixel_values"]) // int(config.vision_config.spatial_merge_size) ** 2


def _shuffled_patches(config: Any, pixels: Pixels) -> int:
    tiles, _, height, width = pixels["pixel_values"].shape
    patch = int(config.vision_config.patch_size)
    return tiles * ((height // patch) * (width // patch) // int(config.scale_factor) ** 2)


def _patches_of_tower(config: Any, pixels: Pixels) -> int:
    """LLaVA: what the tower gives beside patches counts too, and "default" leaves out the first of all that."""
    tiles, _, height, width = pixels["pixel_values"].shape
    tower = config.vision_config
    if tower.model_type not in _EXTRA_FEATURES:
        raise UserError(
            f"A LLaVA model on a {tower.model_type!r} tower: supported are {', '.join(_EXTRA_FEATURES)}, of which the "
            "number of features is known."
        )
    extra: int = _EXTRA_FEATURES[tower.model_type](tower) - (config.vision_feature_select_strategy == "default")
    patch = int(tower.patch_size)
    return tiles * ((height // patch) * (width // patch) + extra)


def _fixed_number(config: Any, pixels: Pixels) -> int:
    return len(pixels["pixel_values"]) * int(config.mm_tokens_per_image)


_EXTRA_FEATURES: dict[str, Callable[[Any], int]] = {
    "clip_vision_model": lambda tower: 1,  # the class token
    "dinov2": lambda tower: 1,
    "dinov2_with_registers": lambda tower: 1 + int(tower.num_register_tokens),
    "siglip_vision_model": lambda tower: 0,
}
"""What vision towers give beside patches."""

_QWEN = VisionFamily(
    _merged_patches,
    names=("pixel_values", "image_grid_thw"),
    has_grid=True,
    connector=("model.visual.merger", "model.visual.deepstack_merger_list"),
)
_IDEFICS = VisionFamily(
    _shuffled_patches, optional=("pixel_attention_mask",), has_row_dimension=True, connector=("model.connector",)
)

FAMILIES: dict[str, VisionFamily] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "llava": VisionFamily(_patches_of_tower),
    "gemma3": VisionFamily(_fixed_number, is_causal=False),
}


def has_vision(config: PreTrainedConfig) -> bool:
    """Whether a model with this configuration has a part that takes images."""
    return "vision_config" in config.sub_configs


def family_of(config: PreTrainedConfig) -> VisionFamily:
    """The family of a model with this configuration.

    Raises:
        UserError: for a model without images, and for a family that is not known.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"Images for a model of type {config.model_type!r}: supported are {', '.join(FAMILIES)}. Use one of them, "
            "or text-only rows (vision=None)."
        )
    return family


def why_images_are_unshareable(config: PreTrainedConfig) -> str:
    """Why a prefix tree would be wrong for rows with images; empty where it is right, and for unknown families."""
    family = FAMILIES.get(config.model_type)
    if family is None or family.is_causal:
        return ""
    return "the tokens of one image see one another in both directions"
