"""What a task is made of: an image, what it shows, and what may be asked about it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image, ImageRef
from lit_agentrl.types import Split


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with what is known of it."""

    id: str
    """Unique within its source, over all splits."""
    image: Image | Path | Callable[[], Image]
    """A file may be given by its path alone: it is hashed when the sample is first shown, not when it is listed. A
    picture may be given by what draws it, always alike."""
    label: str
    """One of the source's labels; empty where only a conversation is known."""
    question: str | None = None
    """What is asked about the image; None leaves that to the suite."""
    answer: str | None = None
    """A reference answer to the question, in words."""
    split: Split = "train"
    findings: str | None = None
    """What can be seen in the image, in words, where that is known: what a demonstration reasons with."""

    def shown(self) -> Image:
        """The image as an observation holds it.

        Raises:
            UserError: The file is not there any more, or cannot be read.
        """
        if isinstance(self.image, Path):
            return file_image(self.image)
        return self.image() if callable(self.image) else self.image


class ImageSource(ABC):
    """Where images come from, in splits that share no image."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """The names of all diseases, in a fixed order; at least two."""

    @abstractmethod
    def samples(self, split: Split) -> Sequence[Sample]:
        """The samples of a split, always in the same order, in which any first so many should be of all labels."""


def file_image(path: Path) -> ImageRef:
    """The reference to an image file. A file that did not change is hashed once in a process.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        stat = path.stat()
        return _reference(str(path), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror or error}.") from error


@lru_cache(maxsize=1 << 17)
def _reference(path: str, modified: int, size: int) -> ImageRef:
    with open(path, "rb") as file:
        return ImageRef(path, hashlib.file_digest(file, "sha256").hexdigest())
