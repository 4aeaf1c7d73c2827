"""The images of a batch of rows, every unique one held once, and which tokens are equal when rows hold images.

To the tokenizer all images look alike: a run of one placeholder token. Two prompts with different pictures would merge
in a prefix tree, so a placeholder is compared by its image's content instead. Where inside the image it stands needs no
key, as equal prefixes hold equally many placeholders before it.

Legend: B rows, L row length, N unique images, F features: the placeholders of all unique images, one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lit_agentrl.errors import UserError
from lit_agentrl.models.vision_families import Pixels, family_of

MAX_CONTENT_ID = 2**63 - 1


def content_id(image: Mapping[str, Tensor]) -> int:
    """A 63-bit hash (of SHA-256) of everything that an image processor gave for an image."""
    digest = hashlib.sha256()
    for name in sorted(image):
        value = image[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8]) >> 1


@dataclass
class VisionInputs:
    """The images that rows show.

    A plain dataclass: Lightning moves its tensors like any other batch. What rows are planned by stays on the host.
    """

    pixels: dict[str, list[Tensor]]
    """Processor outputs by name (`pixel_values`, `image_grid_thw`, ...), each [N] tensors, one a unique image."""
    content_ids: list[int]
    """[N], a hash of each image's content: images with the same one are the same image."""
    num_tokens: list[int]
    """[N], the placeholder tokens that each image fills."""
    shown: list[list[int]]
    """[B], which of the unique images each row shows, in order."""
    image_token_id: int
    """The placeholder token."""

    @classmethod
    def from_rows(
        cls,
        config: PreTrainedConfig,
        images: Sequence[Sequence[Mapping[str, Tensor]]],
        token_ids: Tensor,
        lengths: Tensor,
        content_ids: Sequence[Sequence[int]] | None = None,
    ) -> VisionInputs:
        """The images of rows, repeated ones found by their content.

        Args:
            config: the configuration of the model (`lm.config`).
            images: [B], of each row its images in order, each as the model's image processor returns it for this image
                alone.
            token_ids: [B, L], right-padded, with all placeholders that the images fill.
            lengths: [B], real tokens of each row.
            content_ids: [B], of each image a number in [0, 2^63) that depends on its content alone, say from the first
                bytes of the SHA-256 of its file; by default hashed from the processor's output.

        Raises:
            UserError: for a model whose images are not understood, one content id with different images, and rows whose
                images do not fill their placeholders.
        """
        family = family_of(config)
        if len(images) != len(token_ids) or (content_ids is not None and len(content_ids) != len(images)):
            raise UserError(
                f"Images for {len(images)} rows"
                + ("" if content_ids is None else f" and content ids for {len(content_ids)}")
                + f", but token_ids has {len(token_ids)} rows: pass one list per row, empty where it shows no image."
            )
        unique: dict[int, int] = {}
        pixels: list[Pixels] = []
        shown: list[list[int]] = []
        for b, row in enumerate(images):
            shown.append([])
            row_pixels = [family.normal(image) for image in row]
            for key, image in zip(_keys_of_row(b, row_pixels, content_ids), row_pixels, strict=True):
                place = unique.setdefault(key, len(pixels))
                if place == len(pixels):
                    pixels.append(image)
                elif not _same(image, pixels[place]):
                    raise UserError(
                        f"Row {b}: the content id {key} was given to a different image before. Ids must depend on an "
                        "image's content and its processing alone; leave content_ids out to have them computed."
                    )
                shown[-1].append(place)
        vision = cls(
            pixels=_by_name(pixels),
            content_ids=list(unique),
            num_tokens=[family.count(config, image) for image in pixels],
            shown=shown,
            image_token_id=int(config.image_token_id),
        )
        vision.feature_index(token_ids, lengths)
        return vision

    def rows(self, indices: Sequence[int]) -> VisionInputs:
        """The images of these rows alone, in the order in which they first appear there."""
        shown = [self.shown[b] for b in indices]
        kept = list(dict.fromkeys(image for row in shown for image in row))
        place = {image: k for k, image in enumerate(kept)}
        return replace(
            self,
            pixels={name: [values[image] for image in kept] for name, values in self.pixels.items()},
            content_ids=[self.content_ids[image] for image in kept],
            num_tokens=[self.num_tokens[image] for image in kept],
            shown=[[place[image] for image in row] for row in shown],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VisionInputs:
        """The same images with their pixels on `device`."""
        moved = {
            name: [value.to(device, non_blocking=non_blocking) for value in values]
            for name, values in self.pixels.items()
        }
        return replace(self, pixels=moved)

    def feature_index(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, L] int64 on the host: which of the F features stands at each placeholder; -1 at all other tokens.

        Raises:
            UserError: for rows whose images do not fill their placeholders.
        """
        if len(token_ids) != len(self.shown):
            raise UserError(f"Images of {len(self.shown)} rows with token_ids of {len(token_ids)}: use `rows`.")
        host_ids, host_lengths = token_ids.detach().cpu(), lengths.detach().cpu()
        real = torch.arange(host_ids.shape[1]) < host_lengths[:, None]
        is_placeholder = (host_ids == self.image_token_id) & real
        starts = [0, *accumulate(self.num_tokens)]
        index = torch.full(host_ids.shape, -1, dtype=torch.int64)
        for b, (row, num_placeholders) in enumerate(zip(self.shown, is_placeholder.sum(1).tolist(), strict=True)):
            sizes = [self.num_tokens[image] for image in row]
            if sum(sizes) != num_placeholders:
                raise UserError(
                    f"Row {b} shows {len(row)} images, which fill {' + '.join(map(str, sizes)) or 0} = "
                    f"{sum(sizes)} placeholders, but holds {num_placeholders} (token {self.image_token_id}). Give "
                    "every row all its images, do not cut rows inside an image, and keep the policy from sampling "
                    "placeholders."
                )
            features = [torch.arange(starts[image], starts[image + 1]) for image in row]
            index[b, is_placeholder[b]] = torch.cat(features) if features else index.new_empty(0)
        return index

    def keys(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, L] int64 on the host: what `PackedTree.build` and `plan_packs` tell tokens apart by.

        Text by its token id, a placeholder by its image's content id c, as -1 - c: negative, as no token id is.

        Raises:
            UserError: for rows whose images do not fill their placeholders.
        """
        index = self.feature_index(token_ids, lengths)
        by_feature = torch.tensor(self.content_ids, dtype=torch.int64).repeat_interleave(
            torch.tensor(self.num_tokens, dtype=torch.int64)
        )
        keys = token_ids.detach().cpu().to(torch.int64, copy=True)
        keys[index >= 0] = -1 - by_feature[index[index >= 0]]
        return keys


def _keys_of_row(b: int, row: Sequence[Pixels], content_ids: Sequence[Sequence[int]] | None) -> list[int]:
    """The content ids of a row's images."""
    if content_ids is None:
        return [content_id(image) for image in row]
    given = [int(key) for key in content_ids[b]]
    if len(given) != len(row):
        raise UserError(f"Row {b} shows {len(row)} images, but has {len(given)} content ids.")
    if any(not 0 <= key <= MAX_CONTENT_ID for key in given):
        raise UserError(f"Row {b}: content ids {given} must lie in [0, 2^63).")
    return given


def _same(one: Pixels, other: Pixels) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all is equal; of what a reader gave twice only the address is looked at."""
    is_one = one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    return one.dtype == other.dtype and (is_one or torch.equal(one, other))


def _by_name(pixels: list[Pixels]) -> dict[str, list[Tensor]]:
    """Images as lists of their outputs."""
    names = [sorted(image) for image in pixels]
    if any(others != names[0] for others in names):
        raise UserError(f"Images with different processor outputs, {names}: process all images the same way.")
    return {name: [image[name] for image in pixels] for name in (names[0] if names else [])}
