"""MedMNIST: small images as arrays in one `.npz` file, with splits of its own."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_agentrl.envs.dermatology.labels import DISEASES
from lit_agentrl.envs.dermatology.samples import Sample
from lit_agentrl.envs.dermatology.selection import Selection
from lit_agentrl.envs.dermatology.source import FileSource, Listing
from lit_agentrl.envs.dermatology.splits import Record
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

Array = np.ndarray[Any, np.dtype[Any]]
_NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)
"""Stands in for pixels until they are read."""


class MedMNIST(FileSource):
    """DermaMNIST and its siblings: `train_images`, `train_labels`, and the same of val and test.

    Images are [N, H, W, 3] or [N, H, W] uint8. A split's pixels are read when it is first asked for, whole: of
    `dermamnist_224.npz` that is a gigabyte for a while; what no cap leaves out stays in memory.

    Args:
        path: The `.npz` file; nothing in it is unpickled.
        class_names: What the class numbers 0, 1, ... are called; by default DermaMNIST's.
        select: Which images are used.

    Raises:
        UserError: The file is missing or not as it should be.
    """

    def __init__(
        self,
        path: str,
        class_names: Sequence[str] = DISEASES,
        select: Selection = Selection(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(select)
        self._path, self._class_names = Path(path).expanduser(), tuple(class_names)
        self._found_images: dict[Split, list[Sample]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without pixels."""
        return super().__getstate__() | {"_found_images": {}}

    @property
    def where(self) -> str:
        """The loader and its file."""
        return f"{type(self).__name__} ({self._path})"

    def samples(self, split: Split) -> Sequence[Sample]:
        """The samples of a split, with their pixels."""
        if split not in self._found_images:
            chosen = super().samples(split)
            pixels = {sample.id: sample for sample in self._with_pixels(chosen)}
            self._found_images[split] = [pixels[sample.id] for sample in chosen]
        return self._found_images[split]

    def listing(self) -> Listing:
        """Every image by its split and number."""
        records: list[Record] = []
        for split in SPLITS:
            numbers = self._labels_of(split)
            for number, label in enumerate(numbers):
                sample = Sample(f"{split}/{number}", _NO_IMAGE, self._class_names[label], split=split)
                records.append(Record(sample, split=split))
        if not records:
            raise UserError(f"No images in {self._path}.")
        return Listing(records, classes=self._class_names)

    def _labels_of(self, split: Split) -> list[int]:
        array = self._array(f"{split}_labels")
        if array.size != len(array) or (array.size and array.dtype.kind not in "iu"):
            raise UserError(f"{self._path}: {split}_labels must hold one whole number an image, [N] or [N, 1]; it is "
                            f"{array.dtype} {list(array.shape)}.")  # fmt: skip
        labels = [int(label) for label in array.reshape(-1)]
        if wrong := sorted({label for label in labels if not 0 <= label < len(self._class_names)}):
            raise UserError(
                f"{self._path}: {split}_labels holds {wrong[:5]}, but class_names names the classes 0 to "
                f"{len(self._class_names) - 1}: {', '.join(self._class_names)}. Give the names of this file's classes."
            )
        return labels

    def _with_pixels(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, which may be of several of the file's splits, with their images."""
        made = []
        for split in SPLITS:
            mine = [sample for sample in samples if sample.id.startswith(f"{split}/")]
            images = self._images_of(split) if mine else None
            for sample in mine:
                assert images is not None
                made.append(replace(sample, image=_as_rgb(images[int(sample.id.rpartition("/")[2])])))
        return made

    def _images_of(self, split: Split) -> Array:
        images = self._array(f"{split}_images")
        count = len(self._array(f"{split}_labels"))
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise UserError(
                f"{self._path}: {split}_images is {images.dtype} {list(images.shape)}; it must be uint8 [N, H, W] or "
                "[N, H, W, 3]."
            )
        if len(images) != count:
            raise UserError(f"{self._path}: {len(images)} {split}_images, but {count} {split}_labels.")
        return images

    def _array(self, name: str) -> Array:
        if not self._path.is_file():
            raise UserError(f"{self._path} is not there. Give the path of a MedMNIST file, such as dermamnist.npz.")
        try:
            file = np.load(self._path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with file:
                if name in file.files:
                    return np.asarray(file[name])
                names = ", ".join(file.files)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{self._path} is not the .npz file it should be ({error}). Fetch it again.") from error
        raise UserError(
            f"{self._path} has no array {name!r}; it has {names or 'none'}. MedMNIST files have train_images, "
            "train_labels, and the same of val and test."
        )


def _as_rgb(image: Array) -> Array:
    """A copy [H, W, 3], so that the array of all images can be freed."""
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()
