"""Rows with images on their way through a vision-language model, padded or packed into a prefix tree.

Three rules keep a pack exact. Every unique image is encoded once, and its features are gathered to wherever it stands,
so autograd sums what all places ask of the vision tower. Positions are computed for every row by the model's own rule
and gathered too: from the pack the model would derive others. And the model's own forward puts features into the
embeddings (and, as DeepStack does, into its layers): it is handed the encoded images, not the pixels, so that nothing
of a tree reaches the vision tower.

Legend: B rows, L row length, T packed tokens, F features (the placeholders of all unique images).
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.models.vision_families import family_of


class VisionForward:
    """What a model's own forward takes for rows with images.

    Args:
        lm: a vision-language model, or a PEFT model around one.
        vision: the images of the rows, at least one.
        token_ids: [B, L], right-padded.
        lengths: [B], real tokens of each row.

    Raises:
        UserError: for models whose images are not understood, and for rows whose images do not fit their placeholders.
    """

    def __init__(self, lm: nn.Module, vision: VisionInputs, token_ids: Tensor, lengths: Tensor) -> None:
        base = base_lm(lm)
        self.family = family_of(base.config)
        self.model = cast(PreTrainedModel, base.base_model)
        """The model without its head: token ids and encoded images to final hidden states."""
        if "mm_encoder_outputs" not in inspect.signature(type(self.model).forward).parameters:
            raise UserError(
                f"transformers {transformers.__version__}: its {type(self.model).__name__} does not take encoded "
                "images (`mm_encoder_outputs`); 5.23 does. Upgrade transformers, or use text-only rows."
            )
        self.vision = vision
        self.token_ids = token_ids
        host_index = vision.feature_index(token_ids, lengths)
        self.keys = vision.keys(token_ids, lengths)
        """[B, L] on the host, see `VisionInputs.keys`."""
        place = torch.arange(token_ids.shape[1])
        self.real = (place < lengths.detach().cpu()[:, None]).to(token_ids.device)
        self.feature_index = host_index.to(token_ids.device)
        self.positions = self._grid_positions(host_index) if self.family.has_grid else None
        """[3, B, L]; None where positions count tokens."""

    def padded(self, longest: int) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model to call, and its arguments, for the first `longest` tokens of the rows."""
        index = self.feature_index[:, :longest]
        not_an_image = int(self.vision.image_token_id == 0)  # padding may be made of any token, placeholders too
        inputs: dict[str, Any] = {
            "input_ids": self.token_ids[:, :longest].masked_fill(~self.real[:, :longest], not_an_image),
            "mm_encoder_outputs": {"image": self._encoded(index)},
        }
        if self.positions is not None:
            inputs["position_ids"] = self.positions[:, :, :longest]
        if not self.family.is_causal:
            inputs["token_type_ids"] = (index >= 0).long()
        return self.model, inputs

    def packed(self, tree: PackedTree) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model to call, and its arguments, for the tokens of a tree."""
        places = tree.index[self.real]
        index = torch.full_like(tree.tokens, -1)
        index[places] = self.feature_index[self.real]
        positions = tree.positions[None]
        if self.positions is not None:
            positions = tree.positions.new_zeros(3, 1, len(tree))  # for unused tokens behind the tree: anything
            positions[:, 0, places] = self.positions[:, self.real]
        return self.model, {
            "input_ids": tree.tokens[None],
            "position_ids": positions,
            "mm_encoder_outputs": {"image": self._encoded(index[None])},
        }

    def _encoded(self, index: Tensor) -> Any:
        """The encoder's output with features [F, D] gathered to placeholders, in the order the model meets them."""
        output = self.model.get_image_features(**self.family.joined(self.vision.pixels), return_dict=True)  # type: ignore[operator]
        chosen = index[index >= 0]
        features = self._gathered(output.pooler_output, chosen)
        output.pooler_output = (features,) if self.family.is_causal else features
        if (layers := output.get("deepstack_features")) is not None:
            output.deepstack_features = [(self._gathered(layer, chosen),) for layer in layers]
        return output

    def _gathered(self, images: Any, chosen: Tensor) -> Tensor:
        """Features [F, D] of all images, then those that `chosen` names."""
        features = torch.cat([image.flatten(0, -2) for image in images])
        if len(features) != sum(self.vision.num_tokens):
            raise UserError(
                f"{type(self.model).__name__} made {len(features)} features of images that fill "
                f"{sum(self.vision.num_tokens)} placeholders: its way to select features is not supported."
            )
        return features[chosen]

    def _grid_positions(self, host_index: Tensor) -> Tensor:
        """[3, B, L]: positions in time, height and width by the model's own rule, row by row, on the host."""
        self._check_runs(host_index)
        grids = [grid.cpu() for grid in self.vision.pixels["image_grid_thw"]]
        shown = [grids[image] for row in self.vision.shown for image in row]
        positions, _ = self.model.get_rope_index(  # type: ignore[operator]
            input_ids=self.token_ids.detach().cpu(),
            mm_token_type_ids=(host_index >= 0).int(),  # padding counts as text: it stands behind all that matters
            image_grid_thw=torch.cat(shown),
        )
        return cast(Tensor, positions).to(self.token_ids.device)

    def _check_runs(self, host_index: Tensor) -> None:
        """The rule takes every unbroken run of placeholders for one image, whatever its length.

        Raises:
            UserError: for images that touch, and for an image with text inside.
        """
        for b, (row, index) in enumerate(zip(self.vision.shown, host_index, strict=True)):
            is_image = torch.cat([torch.tensor([False]), index >= 0, torch.tensor([False])]).int()
            edges = is_image.diff()
            runs = ((edges < 0).nonzero() - (edges > 0).nonzero())[:, 0].tolist()
            sizes = [self.vision.num_tokens[image] for image in row]
            if runs != sizes:
                raise UserError(
                    f"Row {b} shows images of {sizes} tokens, but its runs of placeholders are {runs} long: between "
                    "two images there must be a token of text, and none inside an image."
                )
