"""The features of pictures while a policy's weights hold: each is encoded once, and gathered to where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lit_agentrl.models.image_features import encode_images, encoder_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_agentrl.models.vision_families import Pixels, VisionFamily


class ImageFeatures:
    """Features by the number of their picture, within a bound; the least recently used go first."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: VisionFamily,
        load: Callable[[int], Pixels],
        *,
        max_tokens: int,
        max_encoded: int,
    ) -> None:
        """Nothing is encoded yet.

        Args:
            model: Encodes images, and takes them encoded.
            family: Of the model.
            load: The pixels of a picture, by its number.
            max_tokens: Most features that are kept (after `evict`).
            max_encoded: Most features of one forward of the vision tower; a single larger picture runs alone.
        """
        self._model = model
        self._family = family
        self._load = load
        self._max_tokens = max_tokens
        self._max_encoded = max_encoded
        self._features: dict[int, list[Tensor]] = {}  # [n, D] for each layer that takes them, oldest first

    @property
    def num_tokens(self) -> int:
        """Features that are kept."""
        return sum(len(layers[0]) for layers in self._features.values())

    def at(self, numbers: NDArray[np.int64], offsets: NDArray[np.int64]) -> Any:
        """The model's `mm_encoder_outputs` for m placeholders; pictures that are not there yet are encoded.

        Args:
            numbers: [m], the picture of each.
            offsets: [m], which of its picture's features it is.
        """
        wanted = list(dict.fromkeys(numbers.tolist()))
        self._encode([number for number in wanted if number not in self._features])
        for number in wanted:
            self._features[number] = self._features.pop(number)  # now the most recently used
        starts = np.zeros(max(wanted) + 1, dtype=np.int64)
        starts[wanted] = np.cumsum([0, *(len(self._features[number][0]) for number in wanted[:-1])])
        chosen = torch.from_numpy(starts[numbers] + offsets).to(self._model.device)
        layers = zip(*(self._features[number] for number in wanted), strict=True)
        return encoder_output([torch.cat(layer)[chosen] for layer in layers], self._family)

    def _encode(self, numbers: Sequence[int]) -> None:
        """Run the vision tower over pictures, as many at a time as their shapes and the limit allow."""
        device = self._model.device
        for batch in self._batches(numbers):
            pixels = [image for _, _, image in batch]
            joined = {name: [image[name].to(device) for image in pixels] for name in pixels[0]}
            counts = [count for _, count, _ in batch]
            layers = [torch.split(layer, counts) for layer in encode_images(self._model, self._family, joined, counts)]
            for k, (number, _, _) in enumerate(batch):
                # clones: a slice would keep the features of the whole batch alive
                self._features[number] = [layer[k].clone() for layer in layers]

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[tuple[int, int, Pixels]]]:
        """Pictures that one forward takes together: number, features and pixels of each.

        Pixels without a grid beside them have to be of one size. A batch is loaded when it is its turn.
        """
        batch: list[tuple[int, int, Pixels]] = []
        for number in numbers:
            pixels = self._load(number)
            count = self._family.count(self._model.config, pixels)
            num_tokens = sum(other for _, other, _ in batch) + count
            if batch and (num_tokens > self._max_encoded or self._shape(pixels) != self._shape(batch[0][2])):
                yield batch
                batch = []
            batch.append((number, count, pixels))
        if batch:
            yield batch

    def _shape(self, pixels: Pixels) -> list[tuple[str, torch.Size]]:
        """What has to be equal for two pictures to go through the vision tower together."""
        return [(name, pixels[name].shape[1:]) for name in sorted(pixels)]

    def evict(self) -> None:
        """Drop the least recently used features until the bound holds."""
        excess = self.num_tokens - self._max_tokens
        for number in list(self._features):
            if excess <= 0:
                break
            excess -= len(self._features.pop(number)[0])

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._features.clear()
