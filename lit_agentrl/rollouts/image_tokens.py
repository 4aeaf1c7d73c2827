"""Pictures as tokens of their own, so that whatever compares contexts by their tokens tells pictures apart too.

To the tokenizer all images look alike: a run of one placeholder token. In a keyed context each placeholder is the size
of the vocabulary plus the number of its picture, counted up since the last `clear`. Keyed contexts with equal starts
show equal pictures there, so keys and values of one serve the other, and different pictures never share any.

Legend: L tokens of a context, n features of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageRef
from lit_agentrl.models.image_features import image_model
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.vision_families import family_of
from lit_agentrl.rollouts.image_features import ImageFeatures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from lit_agentrl.images import Image, ImageReader
    from lit_agentrl.models.vision_families import Pixels


@dataclass(frozen=True)
class _Picture:
    """What stays known of a picture while its number holds."""

    num_tokens: int
    """n, the placeholders it fills."""
    positions: NDArray[np.int64] | None = None
    """[3, n], rotary positions counted from its first one; None where positions count tokens."""
    shift: int = 0
    """By how much more than n positions grow over it (mostly negative)."""


@dataclass(frozen=True)
class Layout:
    """What a keyed context shows, token by token."""

    numbers: NDArray[np.int64]
    """[L], the picture at each token; -1 at text."""
    offsets: NDArray[np.int64]
    """[L], which of its picture's features stands at each token; 0 at text."""
    positions: NDArray[np.int64]
    """[3, L], rotary positions in time, height and width; all three count tokens where the model's do."""
    shift: int
    """What to add to the place of a token after the context to get its rotary position."""


class ImageTokens:
    """The pictures that contexts have shown since the last `clear`: their numbers, sizes, positions and features."""

    def __init__(
        self, lm: PreTrainedModel, reader: ImageReader, vocab_size: int, *, max_tokens: int, max_encoded: int
    ) -> None:
        """No picture is known yet.

        Args:
            lm: A vision-language model, or a PEFT model around one.
            reader: Turns images into what the model takes.
            vocab_size: Where numbers start: no token of text has this id or a higher one.
            max_tokens: Most features that are kept between batches.
            max_encoded: Most features of one forward of the vision tower.

        Raises:
            UserError: For a model without images, or one whose images are not understood.
        """
        self.family = family_of(base_lm(lm).config)
        self.model = image_model(lm)
        self.image_token_id = reader.image_token_id
        self.features = ImageFeatures(
            self.model, self.family, self._pixels_of, max_tokens=max_tokens, max_encoded=max_encoded
        )
        self._reader = reader
        self._vocab_size = vocab_size
        self._pictures: list[_Picture] = []
        self._numbers: dict[int, int] = {}  # by `Picture.key`
        self._images: dict[int, Image] = {}  # by number: where its pixels can be read again
        self._known: dict[ImageRef | int, int] = {}  # numbers by file, or by the id of an array

    def keyed(self, contexts: Sequence[list[int]], images: Sequence[Sequence[Image]]) -> list[list[int]]:
        """The contexts with every placeholder replaced by an id that only its picture has.

        Args:
            contexts: [B], ids of the tokenizer.
            images: [B], what each context has placeholders for, in order.

        Raises:
            UserError: For a context whose images do not fill its placeholders.
        """
        if len(images) != len(contexts):
            raise UserError(
                f"Images for {len(images)} contexts, but there are {len(contexts)}: give one list per context, empty "
                "where it shows none."
            )
        return [
            self._key(index, context, [self._number(image) for image in shown])
            for index, (context, shown) in enumerate(zip(contexts, images, strict=True))
        ]

    def are_shown(self, context: Sequence[int]) -> bool:
        """Whether a keyed context shows pictures."""
        return max(context) >= self._vocab_size

    def _key(self, index: int, context: list[int], numbers: list[int]) -> list[int]:
        sizes = [self._pictures[number].num_tokens for number in numbers]
        num_placeholders = context.count(self.image_token_id)
        if sum(sizes) != num_placeholders:
            raise UserError(
                f"Context {index} shows {len(sizes)} images, which fill {' + '.join(map(str, sizes)) or 0} = "
                f"{sum(sizes)} placeholders, but holds {num_placeholders} (token {self.image_token_id}). Give every "
                "context all its images, in order, and do not cut it inside an image."
            )
        if not numbers:
            return context
        ids = np.array(context)
        places = np.flatnonzero(ids == self.image_token_id)
        runs = [len(run) for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)]
        if self.family.has_grid and runs != sizes:  # the model's rule for positions takes a run for one image
            raise UserError(
                f"Context {index} shows images of {sizes} tokens, but its runs of placeholders are {runs} long: "
                "between two images there must be a token of text, and none inside an image."
            )
        ids[places] = self._vocab_size + np.repeat(numbers, sizes)
        return cast("list[int]", ids.tolist())

    def _number(self, image: Image) -> int:
        """The number of an image's picture; the image is read where it is not known."""
        name = image if isinstance(image, ImageRef) else id(image)
        if name not in self._known:
            picture = self._reader.read(image)
            number = self._numbers.setdefault(picture.key, len(self._pictures))
            if number == len(self._pictures):
                self._pictures.append(self._described(self.family.normal(picture.pixels)))
            self._known[name] = number
            if not isinstance(self._images.get(number), ImageRef):
                self._images[number] = image
        return self._known[name]

    def _described(self, pixels: Pixels) -> _Picture:
        """The size of a picture, and its positions by the model's own rule, applied to its placeholders alone."""
        count = self.family.count(self.model.config, pixels)
        if not self.family.has_grid:
            return _Picture(count)
        ids = torch.full((1, count), self.image_token_id)
        positions, shift = self.model.get_rope_index(  # type: ignore[operator]
            input_ids=ids, mm_token_type_ids=torch.ones_like(ids).int(), image_grid_thw=pixels["image_grid_thw"].cpu()
        )
        return _Picture(count, positions[:, 0].numpy(), int(shift))

    def _pixels_of(self, number: int) -> Pixels:
        """The pixels of a picture. Its reader keeps some, so that here none have to be kept."""
        return self.family.normal(self._reader.read(self._images[number]).pixels)

    def layout(self, ids: NDArray[np.int64]) -> Layout:
        """What a keyed context, or the beginning of one, shows: `ids` [L]."""
        numbers = np.where(ids >= self._vocab_size, ids - self._vocab_size, -1)
        offsets = np.zeros_like(numbers)
        positions = np.tile(np.arange(len(ids)), (3, 1))
        places = np.flatnonzero(numbers >= 0)
        start = shift = 0
        while start < len(places):
            picture = self._pictures[numbers[places[start]]]
            span = places[start : start + picture.num_tokens]  # fewer where the beginning ends inside the picture
            offsets[span] = np.arange(len(span))
            if picture.positions is not None:
                positions[:, span] = positions[:, span[:1]] + picture.positions[:, : len(span)]
                positions[:, span[-1] + 1 :] += picture.shift
            start += picture.num_tokens
            shift += picture.shift
        return Layout(numbers, offsets, positions, shift)

    def end_call(self) -> None:
        """Forget the arrays of a call: its caller may draw into them, or free them for others with the same id."""
        self._known = {name: number for name, number in self._known.items() if isinstance(name, ImageRef)}
        self._images = {number: image for number, image in self._images.items() if isinstance(image, ImageRef)}

    def clear(self) -> None:
        """Forget everything: the weights have changed, and the keys and values that numbers told apart are gone."""
        self.features.clear()
        self._pictures.clear()
        for names in (self._numbers, self._images, self._known):
            names.clear()
