"""Rows with images on their way through a vision-language model, padded or packed into a prefix tree.

Three rules keep a pack exact. Every unique image is encoded once, and its features are gathered to wherever it stands,
so autograd sums what all places ask of the vision tower. Positions are computed for every row by the model's own rule
and gathered too: from the pack the model would derive others. And the model's own forward puts features into the
embeddings (and, as DeepStack does, into its layers): it is handed the encoded images, not the pixels, so that nothing
of a tree reaches the vision tower.

Legend: B rows, L row length, T packed tokens, F features (the placeholders of all unique images).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.image_features import encode_images, encoder_output, image_model
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
        self.model = image_model(lm)
        """The model without its head: token ids and encoded images to final hidden states."""
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
            "mm_encoder_outputs": self._encoded(index),
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
            "mm_encoder_outputs": self._encoded(index[None]),
        }

    def _encoded(self, index: Tensor) -> Any:
        """The encoded images with features [F, D] gathered to placeholders, in the order the model meets them."""
        features = encode_images(self.model, self.family, self.vision.pixels, self.vision.num_tokens)
        chosen = index[index >= 0]
        return encoder_output([layer[chosen] for layer in features], self.family)

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
